"""The run folder: its layout, and that it alone is enough."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from moeut_kernels import tuned_tiles
from moeut_kernels.tuned_tiles import Tuned
from safetensors import safe_open

from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.measure.macs import count_macs
from moeut_compose.progress import PlainReporter
from moeut_compose.spec.io import load_recipe, load_spec, parse_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CheckpointSpec, HardwareSpec, RecipeSpec, SentencePieceFile
from moeut_compose.train.checkpoint import list_checkpoints
from moeut_compose.train.errors import CheckpointError, RunError, RunNotFound, TrainingDiverged
from moeut_compose.train.folder import environment
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import load_run, resume_folder, train


def test_the_layout_of_a_run(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> None:
    result = train(spec, recipe, argv=["moeut-compose", "train", "x"])
    run = result.folder
    assert run.parent == tmp_path / "runs"
    assert run.name.endswith("-moeut_tiny")
    assert load_spec(str(run / "architecture.yaml")) == spec
    assert load_recipe(str(run / "recipe.yaml")) == recipe
    environment = json.loads((run / "environment.json").read_text())
    assert environment["starts"][0]["command"] == ["moeut-compose", "train", "x"]
    assert environment["starts"][0]["packages"]["torch"] == torch.__version__
    assert Tokenizer.load(run / "tokenizer.model").vocab_size == 120
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008\n"
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004", "step-00000008"]
    assert result.plot == run / "plots" / "loss.png"
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    assert (run / "plots" / "loss.svg").is_file()
    assert result.sample.startswith("The")
    assert result.tokens == 8 * 6 * 16
    assert not list(run.rglob("*.tmp"))


def test_tuned_tiles_are_named(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What bits come out depends on the tiles: a run says where its tiles come from."""
    tuned = Tuned(tmp_path / "tiles.json", {"walk": (128, 64, 0, 4, 3), "weight": (128, 64, 64, 4, 4)})
    monkeypatch.setattr(tuned_tiles, "in_use", lambda device: tuned)
    out = io.StringIO()
    train(spec, recipe.model_copy(update={"steps": 1}), reporter=PlainReporter(out), device="cpu")
    assert f"tuned tiles for walk, weight, from {tmp_path / 'tiles.json'}" in out.getvalue()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend GPU")
    monkeypatch.setenv("MOEUT_KERNELS_TUNED", "1")
    found = json.loads(json.dumps(environment([], torch.device("cuda", 0))))
    assert found["tuned_tiles"]["file"] == str(tmp_path / "tiles.json")
    assert found["tuned_tiles"]["tiles"]["walk"] == [128, 64, 0, 4, 3]
    assert found["variables"]["MOEUT_KERNELS_TUNED"] == "1"


def test_weights_carry_their_architecture(spec: ModelSpec, recipe: RecipeSpec) -> None:
    result = train(spec, recipe)
    with safe_open(result.checkpoint / "model.safetensors", "pt") as file:
        assert parse_spec(file.metadata()["architecture"]) == spec
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == spec.num_params()  # noqa: SIM118


def test_metrics_hold_means_and_parts(spec: ModelSpec, recipe: RecipeSpec) -> None:
    result = train(spec, recipe)
    rows = read_rows(result.folder / "metrics.jsonl")
    training = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in training] == [3, 6, 8]
    parts = [name for name in training[0] if name.startswith("stages.")]
    for row in training:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + sum(row[name] for name in parts))
        assert row["tokens"] == row["step"] * 96
        assert row["tokens_per_second"] > 0
        assert row["grad_norm"] > 0
    assert parts
    validation = [row for row in rows if row["event"] == "validation"]
    assert validation[-1]["perplexity"] == pytest.approx(result.validation.perplexity)
    with (result.folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["event"], int(row["step"])) for row in table] == [
        (row["event"], row["step"]) for row in rows
    ]
    assert float(table[0]["loss"]) == training[0]["loss"]


def test_utilisation_needs_a_peak(spec: ModelSpec, recipe: RecipeSpec) -> None:
    plain = train(spec, recipe)
    assert {row["mfu"] for row in training_rows(plain.folder)} == {None}
    known = recipe.model_copy(update={"hardware": HardwareSpec(peak_tflops=2.0)})
    for row in training_rows(train(spec, known).folder):
        flops = 6 * count_macs(spec, 16).total_per_token * row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(flops / 2e12)


def training_rows(run: Path) -> list[dict]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["event"] == "train"]


def test_the_progress_line_shows_loss_speed_and_utilisation(spec: ModelSpec, recipe: RecipeSpec) -> None:
    for peak, shown in ((None, r"MFU n/a"), (1e-9, r"MFU \d+\.\d%")):
        out = io.StringIO()
        hardware = HardwareSpec(peak_tflops=peak)
        train(spec, recipe.model_copy(update={"hardware": hardware}), reporter=PlainReporter(out))
        assert re.search(rf"^training: 8/8  loss \d\.\d+  [\d.]+k? tokens/s  {shown}", out.getvalue(), re.M)


def test_training_lowers_the_loss(spec: ModelSpec, recipe: RecipeSpec) -> None:
    result = train(spec, recipe.model_copy(update={"steps": 60, "optimizer": AdamWSpec(lr=1e-2)}))
    rows = [row for row in read_rows(result.folder / "metrics.jsonl") if row["event"] == "train"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 1
    assert result.validation.cross_entropy < math.log(120) - 1


def test_a_run_folder_alone_is_enough(
    spec: ModelSpec, recipe: RecipeSpec, text_file: Path, tmp_path: Path
) -> None:
    result = train(spec, recipe)
    text_file.unlink()
    moved = result.folder.rename(tmp_path / "moved")
    run = load_run(moved)
    assert (run.step, run.spec, run.recipe.name, run.context) == (8, spec, "test", 16)
    early = load_run(moved / "checkpoints" / "step-00000004")
    assert early.step == 4
    assert not torch.equal(early.model.embedding.weight, run.model.embedding.weight)
    assert load_run(moved / "checkpoints" / "latest").step == 8


def test_checkpoints_kept(spec: ModelSpec, recipe: RecipeSpec) -> None:
    rule = CheckpointSpec(interval=1, keep_last=2, keep_every=3)
    result = train(spec, recipe.model_copy(update={"checkpoint": rule}))
    assert [int(path.name[-8:]) for path in list_checkpoints(result.folder)] == [3, 6, 7, 8]


def test_divergence_is_an_error_and_the_last_checkpoint_stays_sound(
    spec: ModelSpec, recipe: RecipeSpec
) -> None:
    wild = recipe.model_copy(update={"optimizer": AdamWSpec(lr=1e30), "clip_norm": None, "steps": 30})
    with pytest.raises(TrainingDiverged, match=r"diverged at step 2: 10 steps in a row") as caught:
        train(spec, wild)
    assert caught.value.exit_code == 1


def test_a_folder_in_use_is_refused(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is not empty; name another folder in --out"):
        train(spec, recipe, out=tmp_path / "full")
    done = train(spec, recipe, out=tmp_path / "done").folder
    with pytest.raises(RunError, match="is not empty; --resume auto"):
        train(spec, recipe, out=done, resume="none")


def test_paths_that_are_no_runs(tmp_path: Path, spec: ModelSpec, recipe: RecipeSpec) -> None:
    with pytest.raises(RunNotFound, match="does not exist") as caught:
        load_run(tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    with pytest.raises(RunNotFound, match=r"holds no architecture\.yaml"):
        load_run(tmp_path)
    with pytest.raises(RunNotFound):
        train(spec, recipe, resume=tmp_path / "nowhere")


def test_a_run_without_checkpoint(spec: ModelSpec, recipe: RecipeSpec) -> None:
    run = train(spec, recipe).folder
    for path in list_checkpoints(run):
        path.rename(path.with_name("elsewhere-" + path.name))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_run(run)


def test_which_run_a_command_would_go_on_with(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> None:
    run = train(spec, recipe).folder
    assert resume_folder(run, "auto") == run
    assert resume_folder(run, "none") is None
    assert resume_folder(None, "auto") is None
    assert resume_folder(tmp_path / "new", "auto") is None
    assert resume_folder(None, run / "checkpoints" / "step-00000004") == run


def test_relative_paths_become_absolute(
    spec: ModelSpec, recipe: RecipeSpec, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    first = train(spec, recipe)
    (text_file.parent / "own.model").write_bytes((first.folder / "tokenizer.model").read_bytes())
    data = recipe.data.model_copy(update={"files": [text_file.name]})
    tokenizer = SentencePieceFile(file="own.model")
    run = train(spec, recipe.model_copy(update={"data": data, "tokenizer": tokenizer})).folder
    written = load_recipe(str(run / "recipe.yaml"))
    assert written.data.files == [str(text_file)]
    assert written.tokenizer.file == str(text_file.parent / "own.model")


def test_an_unwritable_place_is_an_error(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to the run folder"):
        train(spec, recipe, out=tmp_path / "file" / "run")
