"""Synthetic tasks from recipe to accuracy, and runs that stop on the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from moeut_compose.cli import app
from moeut_compose.data.errors import DataError
from moeut_compose.data.synthetic import FIRST_SYMBOL, synthetic_windows
from moeut_compose.evaluate.perplexity import measure_perplexity
from moeut_compose.evaluate.synthetic import evaluate_synthetic, right_answers, with_repeats
from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.recipe import BuiltinData
from moeut_compose.train.checkpoint import list_checkpoints
from moeut_compose.train.run import load_run, train

SMALL = ["d_model=32", "stages.0.repeats=2", "stages.0.layers.0.feedforward.d_ff=64"]
SHORT = ["steps=6", "batch.size=8", "batch.micro=3", "checkpoint.interval=3", "evaluation.windows=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "chain"
    train(
        load_spec("synthetic/shared", overrides=SMALL),
        load_recipe("synthetic_function_chain", overrides=SHORT),
        out=out,
        device="cpu",
    )
    return out


def test_a_run_that_goes_on_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    middle, last = list_checkpoints(folder)
    result = train(
        load_spec(folder / "architecture.yaml"),
        load_recipe(folder / "recipe.yaml"),
        out=tmp_path / "again",
        resume=middle,
        device="cpu",
    )
    whole, again = (load_run(path).model.state_dict() for path in (last, result.checkpoint))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


class Oracle(torch.nn.Module):
    """Gives the right answer where `is_right` says so for the symbols before it, else the first symbol."""

    def __init__(self, answers: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.answers = answers

    def forward(self, ids: torch.Tensor) -> Any:
        logits = torch.zeros(*ids.shape, 32)
        for row, line in enumerate(ids.tolist()):
            symbols = tuple(symbol - FIRST_SYMBOL for symbol in line if symbol)
            logits[row, len(symbols) - 1, self.answers.get(symbols, -FIRST_SYMBOL) + FIRST_SYMBOL] = 1.0
        return type("Output", (), {"logits": logits})


def test_the_last_answer_counts() -> None:
    examples = [([1, 2, 3], {1: 4, 2: 0}), ([1, 2], {1: 4}), ([2, 2, 2, 2], {3: 1})]
    known = {tuple(symbols): answers[len(symbols) - 1] for symbols, answers in examples[:2]}
    assert right_answers(Oracle(known), examples, batch_size=2) == [True, True, False]  # type: ignore[arg-type]


def test_difficulties_and_intervals(folder: Path) -> None:
    results = evaluate_synthetic(load_run(folder), n_items=40)
    assert [(result.difficulty, result.is_trained) for result in results] == [
        (1, True), (2, True), (3, True), (4, False), (5, False), (6, False),
    ]  # fmt: skip
    for result in results:
        low, high = result.confidence_interval
        assert 0 <= low <= result.accuracy <= high <= 1
        assert (result.shortcut, result.n) == (1 / 8, 40)


def test_other_numbers_of_passes_use_the_same_weights(folder: Path) -> None:
    run = load_run(folder)
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        as_trained, more = (with_repeats(run, n)(ids).logits for n in (2, 5))
        assert torch.equal(as_trained, run.model(ids).logits)
    assert not torch.allclose(as_trained, more)
    assert sum(p.numel() for p in with_repeats(run, 5).parameters()) == run.spec.num_params()


def test_a_loss_over_answers_alone(folder: Path) -> None:
    """Mean over all answers of the evaluation, whatever the batch."""
    run = load_run(folder)
    text = synthetic_windows(load_recipe("synthetic_p_hop").data, "validation")  # type: ignore[arg-type]
    one, many = (measure_perplexity(run.model, text, context=32, windows=6, batch_size=n) for n in (1, 4))
    n_answers = int((text.windows(range(6), 32)[:, 1] >= 0).sum())
    assert (one.tokens, many.tokens) == (n_answers, n_answers)
    windows = torch.from_numpy(text.windows(range(6), 32))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            run.model(windows[:, 0]).logits.flatten(0, 1), windows[:, 1].flatten(), reduction="none"
        )
    expected = losses.sum().item() / n_answers
    assert (one.cross_entropy, many.cross_entropy) == pytest.approx((expected, expected), rel=1e-5)
    assert np.isfinite(one.bits_per_byte)


def test_refusals(folder: Path) -> None:
    run = load_run(folder)
    text = run.recipe.model_copy(update={"data": BuiltinData()})
    with pytest.raises(DataError, match="was trained on builtin data, not on a synthetic task"):
        evaluate_synthetic(type(run)(run.path, run.spec, text, run.model, run.step))
    single = run.spec.model_copy(update={"stages": [run.spec.stages[0].model_copy(update={"repeats": 1})]})
    with pytest.raises(DataError, match="shares no depth"):
        with_repeats(type(run)(run.path, single, run.recipe, run.model, run.step), 3)


@pytest.fixture
def call(folder: Path) -> Callable[..., Result]:
    return lambda *options: CliRunner().invoke(app, ["evaluate", str(folder), "--device", "cpu", *options])


def test_the_command_line(call: Callable[..., Result]) -> None:
    result = call("--tasks", "perplexity,synthetic", "--limit", "20", "--repeats", "2,4", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [record["repeats"] for record in document["synthetic"]] == [2, 4]
    assert len(document["synthetic"][0]["difficulties"]) == 6
    assert document["tokens"] == 8
    table = call("--tasks", "synthetic", "--limit", "20", "--repeats", "2,4").stdout.splitlines()
    assert table[1].split() == ["difficulty", "trained", "2", "passes", "4", "passes", "shortcut", "items"]
    assert [line.split()[:2] for line in table[4:6]] == [["3", "yes"], ["4", "no"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "3"], "--repeats is for --tasks synthetic"),
        (["--tasks", "synthetic", "--repeats", "0"], "3,6,9"),
    ],
)
def test_wrong_usage(call: Callable[..., Result], options: list[str], message: str) -> None:
    result = call(*options)
    assert result.exit_code == 2
    assert message in result.stderr
