"""What a run is for: evaluating it and letting it write, from its folder alone."""

from pathlib import Path

import pytest

from moeut_compose.evaluate.perplexity import evaluate_run
from moeut_compose.generate import generate
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, RecipeSpec, TextData
from moeut_compose.train.run import Run, load_run, train


@pytest.fixture
def finished(
    spec: ModelSpec, recipe: RecipeSpec, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Trained once for all tests; its training text is gone."""
    folder = tmp_path_factory.getbasetemp() / "finished-run"
    if not folder.exists():
        train(spec, recipe.model_copy(update={"steps": 20, "optimizer": AdamWSpec(lr=1e-2)}), out=folder)
    text_file.unlink()
    return load_run(folder)


def test_evaluation_repeats_the_figure_of_training(finished: Run) -> None:
    from moeut_compose.train.metrics import read_rows

    row = [row for row in read_rows(finished.path / "metrics.jsonl") if row["event"] == "validation"][-1]
    result = evaluate_run(finished)
    assert result["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-2)
    assert (result["step"], result["windows"], result["tokens"]) == (20, 5, 80)
    assert evaluate_run(finished, windows=2)["windows"] == 2


def test_other_text_can_be_evaluated(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("the whale saw a ship. " * 50)
    data = TextData(files=[str(tmp_path / "other.txt")], validation_files=[str(tmp_path / "other.txt")])
    result = evaluate_run(finished, data=data)
    assert result["tokens"] > 0
    assert result["perplexity"] != evaluate_run(finished)["perplexity"]


def test_writing_with_a_cache_equals_full_forward_passes(finished: Run) -> None:
    """Greedy writing with kept keys and values equals choosing from full forward passes."""
    import torch

    tokenizer = finished.tokenizer
    prompt = "the captain"
    written = generate(finished.model, tokenizer, prompt, max_new_tokens=12, temperature=0, stop=None)
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(finished.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert written == tokenizer.decode(ids)
    assert written.startswith(prompt)


def test_seeds_and_streaming(finished: Run) -> None:
    def write(seed: int, **settings) -> str:
        return generate(
            finished.model, finished.tokenizer, "a ship", max_new_tokens=20, seed=seed, **settings
        )

    pieces: list[str] = []
    assert write(1, stream=pieces.append) == write(1) == "".join(pieces)
    assert len({write(seed) for seed in range(5)}) > 1
    assert write(1, top_k=1) == write(2, top_p=1e-6) == write(3, temperature=0)


def test_an_empty_prompt_begins_a_document(finished: Run) -> None:
    text = generate(finished.model, finished.tokenizer, "", max_new_tokens=8)
    assert isinstance(text, str)
    assert "<STORY_SEP>" not in text


def test_writing_stops_at_the_stop_text(finished: Run) -> None:
    whole = generate(finished.model, finished.tokenizer, "the", max_new_tokens=30, temperature=0, stop=None)
    stop = whole[8:11]
    pieces: list[str] = []
    cut = generate(
        finished.model,
        finished.tokenizer,
        "the",
        max_new_tokens=30,
        temperature=0,
        stop=stop,
        stream=pieces.append,
    )
    assert cut == ("the" + whole[3 : whole.index(stop, 3)]).rstrip()
    assert stop not in "".join(pieces)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_settings_out_of_range(finished: Run, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        generate(finished.model, finished.tokenizer, "x", **settings)
