"""`export` and `import --format transformers`, and what they leave behind when they fail."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from moeut_compose.cli import app
from moeut_compose.interchange.huggingface import export, files
from moeut_compose.interchange.huggingface.back import read_export
from moeut_compose.spec.io import load_recipe
from moeut_compose.spec.recipe import TrainSentencePiece
from moeut_compose.train.errors import CheckpointError
from moeut_compose.train.run import load_run
from tests.interchange.huggingface.models import family, small_run, tokenizer_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    small_run(folder, family("moeut_tiny"), tokenizer=tokenizer_of(TrainSentencePiece()))
    row = {
        "event": "validation",
        "step": 7,
        "perplexity": 12.5,
        "bits_per_byte": 1.25,
        "validation_tokens": 640,
    }
    (folder / "metrics.jsonl").write_text(
        json.dumps({"event": "train", "step": 7}) + "\n" + json.dumps(row) + "\n"
    )
    (folder / "evaluation").mkdir()
    result = {"task": "blimp", "protocol": "published", "step": 7, "n": 10, "accuracy": 0.625}
    (folder / "evaluation" / "blimp.json").write_text(json.dumps(result))
    (folder / "evaluation" / "piqa.json").write_text(json.dumps(result | {"task": "piqa", "step": 6}))
    return folder


@pytest.mark.slow
def test_export_and_back(run: Path, tmp_path: Path) -> None:
    destination = tmp_path / "new" / "mine"
    result = CliRunner().invoke(
        app, ["export", str(run), str(destination), "--format", "transformers", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["relative_difference"] <= document["tolerance"]
    assert (document["name"], document["step"], document["texts"]) == ("moeut_tiny", 7, len(export.TEXTS))
    assert [path.name for path in destination.parent.iterdir()] == ["mine"]
    with safe_open(destination / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    card = (destination / "README.md").read_text()
    for said in (
        "| perplexity on held-out text | 12.500 |",
        "blimp (published protocol, 10 items) | 62.50 %",
        "not stated",
    ):
        assert said in card
    assert "piqa" not in card
    command = [
        "import",
        str(destination),
        "--format",
        "transformers",
        "--out",
        str(tmp_path / "back"),
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 7
    before, after = load_run(run).model.state_dict(), load_run(tmp_path / "back").model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_an_export_that_differs_is_not_left_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        weights = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
        weights["model.stages.0.layers.1.feedforward.down"][3] += 0.5
        return weights

    monkeypatch.setattr(files, "exported_weights", damaged)
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "the export differs from the run: logits differ by" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_export_that_lacks_weights_is_not_left_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files.exported_weights
    monkeypatch.setattr(files, "exported_weights", lambda model: dict(list(whole(model).items())[1:]))
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "cannot load the export: ValueError: the checkpoint lacks weights of Embedding" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path)])
    assert (result.exit_code, result.stderr) == (1, f"error: {tmp_path} is not empty; name another folder\n")
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "mine.txt")])
    assert (result.exit_code, (tmp_path / "mine.txt").read_text()) == (1, "mine")


@pytest.mark.parametrize(
    ("found", "says"),
    [(None, "which is not installed"), ("4.57.1", "and 4.57.1 is installed")],
)
def test_transformers_is_missing(
    found: str | None, says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(export, "version", version)
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    expected = f"error: this needs transformers 5, {says}: pip install 'moeut-compose[hf]'\n"
    assert (result.exit_code, result.stderr) == (1, expected)
    assert not (tmp_path / "out").exists()


def test_no_such_run(tmp_path: Path) -> None:
    assert (
        CliRunner().invoke(app, ["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]).exit_code == 2
    )


def test_recipes_travel_without_the_folders_of_a_machine() -> None:
    given = [
        "data={kind: text, files: [/home/me/a.txt, 'b/*.txt']}",
        "tokenizer={kind: sentencepiece, file: /x/y.model}",
    ]
    recipe = files.without_folders(load_recipe("default", given))
    assert recipe.data.files == ["a.txt", "b/*.txt"]
    assert recipe.tokenizer.file == "y.model"
    plain = load_recipe("paper")
    assert files.without_folders(plain) == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "describes no model that `moeut-compose export` wrote"),
        ('{"model_type": "moeut_compose", "architecture": {"name": "x"}}', "vocab_size"),
        ("[", "cannot be read"),
        ("[]", "holds no document"),
    ],
)
def test_what_is_no_export(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_export(tmp_path)


def test_import_refuses_what_does_not_fit(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    (tmp_path / "export").mkdir()
    files.write_files(loaded, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    config["architecture"]["stages"][0]["layers"][0]["feedforward"]["n_experts"] += 1
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    command = [
        "import",
        str(tmp_path / "export"),
        "--format",
        "transformers",
        "--out",
        str(tmp_path / "back"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "does not fit the architecture" in result.stderr
    assert not (tmp_path / "back").exists()
    assert CliRunner().invoke(app, [*command, "--config", "x.json"]).exit_code == 2
    assert CliRunner().invoke(app, ["import", "nowhere", *command[2:]]).exit_code == 2
