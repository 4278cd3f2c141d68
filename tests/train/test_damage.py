"""Checkpoints whose checksums are right and whose content is not what training wrote."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeut_compose.data.errors import DataError
from moeut_compose.data.tokens import open_tokens
from moeut_compose.evaluate.perplexity import evaluate_run
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.checkpoint import find_checkpoint, open_checkpoint
from moeut_compose.train.errors import CheckpointError
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import load_run, train
from tests.train.mutations import sign


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")


@pytest.fixture
def short(recipe: RecipeSpec) -> RecipeSpec:
    checkpoint = recipe.checkpoint.model_copy(update={"interval": 1})
    evaluation = recipe.evaluation.model_copy(update={"windows": 1, "sample_tokens": 1})
    return recipe.model_copy(update={"steps": 2, "checkpoint": checkpoint, "evaluation": evaluation})


@pytest.fixture
def run(spec: ModelSpec, short: RecipeSpec, tmp_path: Path) -> Path:
    return train(spec, short, out=tmp_path / "run").folder


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def rewrite_weights(checkpoint: Path, way: str) -> None:
    path = checkpoint / "model.safetensors"
    tensors, header = load_file(path), None
    if way in ("complex numbers", "no number"):
        header = {"architecture": (checkpoint.parents[1] / "architecture.yaml").read_text()}
    if way == "complex numbers":
        tensors["head.weight"] = tensors["head.weight"].to(torch.complex64)
    if way == "no number":
        tensors["head.weight"][0] = float("nan")
    if way == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        save_file(tensors, path, metadata=header)
    sign(checkpoint)


@pytest.mark.parametrize("way", ["cut", "no architecture", "complex numbers", "no number"])
def test_weights_that_are_none_are_refused(run: Path, way: str) -> None:
    rewrite_weights(newest(run), way)
    with pytest.raises(CheckpointError, match=r"step-00000002.* (does|is) not"):
        load_run(run)


def set_state(state: dict[str, Any], way: str) -> Any:
    trainer = state["trainer"]
    moments = trainer["optimizer"]["head.weight"]
    match way:
        case "no map":
            return 3
        case "another step":
            trainer["step"] = 7
        case "moments of another shape":
            moments["exp_avg"] = moments["exp_avg"][:1]
        case "a moment less":
            del moments["exp_avg_sq"]
        case "no random state":
            trainer["random"]["torch"] = trainer["random"]["torch"][:9]
        case "no means":
            state["means"]["sums"] = {"loss": None}
        case "no micro-batch":
            state["micro_batch"] = 0
    return state


@pytest.mark.parametrize(
    "way",
    [
        "cut",
        "no map",
        "another step",
        "moments of another shape",
        "a moment less",
        "no random state",
        "no means",
        "no micro-batch",
    ],
)
def test_state_that_does_not_fit_is_refused(run: Path, spec: ModelSpec, short: RecipeSpec, way: str) -> None:
    path = newest(run) / "train_state.pt"
    if way == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        torch.save(set_state(torch.load(path, weights_only=True), way), path)
    sign(newest(run))
    with pytest.raises(CheckpointError, match=r"train_state\.pt does not hold what training saves there"):
        train(spec, short.model_copy(update={"steps": 3}), out=run)
    assert open_checkpoint(newest(run)).step == 2


@pytest.mark.parametrize(
    "change",
    [{"step": 1}, {"step": True}, {"step": -1}, {"files": {}}, {"format": None}],
)
def test_a_description_of_another_checkpoint_is_refused(run: Path, change: dict[str, Any]) -> None:
    path = newest(run) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"meta\.json is"):
        open_checkpoint(newest(run))


def test_descriptions_nested_without_end_and_files_elsewhere_are_refused(run: Path) -> None:
    path = newest(run) / "meta.json"
    meta = json.loads(path.read_text())
    meta["files"]["/dev/zero"] = {"bytes": 0, "sha256": ""}
    for text in ("[" * 100_000, json.dumps(meta)):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"meta\.json is"):
            open_checkpoint(newest(run))


def test_the_same_step_can_be_damaged_twice(run: Path) -> None:
    for number in (1, 2):
        if number == 2:
            shutil.copytree(run / "checkpoints" / "step-00000001", newest(run))
        (newest(run) / "train_state.pt").write_bytes(b"")
        found = find_checkpoint(run, warn=lambda text: None, set_aside=True)
        assert found is not None
        assert found.step == 1
    aside = sorted(path.name for path in (run / "checkpoints").glob("*.damaged*"))
    assert aside == ["step-00000002.damaged", "step-00000002.damaged.2"]


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(run: Path) -> None:
    loaded = load_run(run)
    small = replace(loaded, spec=loaded.spec.model_copy(update={"vocab_size": 119}))
    with pytest.raises(DataError, match=r"has 120 pieces, more than the model knows \(119\)"):
        small.tokenizer  # noqa: B018


@pytest.mark.parametrize("ids", [b"\xff\xff", b"\x00\x00"])
def test_held_out_text_that_is_none_is_made_again(run: Path, ids: bytes) -> None:
    before = evaluate_run(load_run(run))["perplexity"]
    folder = run / "validation"
    index = json.loads((folder / "index.json").read_text())
    (folder / "tokens.bin").write_bytes(ids * index["n_tokens"])
    if ids == b"\x00\x00":
        (folder / "index.json").write_text(json.dumps(index | {"n_bytes": 0}))
    assert evaluate_run(load_run(run))["perplexity"] == pytest.approx(before)


def test_files_without_end_are_not_read(run: Path) -> None:
    for path in (run / "tokenizer.model", newest(run) / "meta.json", run / "validation" / "index.json"):
        path.unlink()
        os.mkfifo(path)
    assert load_run(run / "checkpoints" / "step-00000001").step == 1
    with pytest.raises(DataError, match="not a plain file"):
        load_run(run / "checkpoints" / "step-00000001").tokenizer  # noqa: B018
    with pytest.raises(CheckpointError, match="not a plain file"):
        open_checkpoint(newest(run))
    with pytest.raises(DataError, match="not a plain file"):
        open_tokens(run / "validation")


def test_lines_that_are_no_rows_of_metrics_are_left_out(run: Path) -> None:
    path = run / "metrics.jsonl"
    rows = read_rows(path)
    assert [row["event"] for row in rows] == ["train", "validation"]
    damaged = [
        {"step": 2},
        {"event": "train", "step": 2},
        rows[0] | {"cross_entropy": "low"},
        rows[1] | {"windows": None},
        rows[1] | {"step": True},
        [],
    ]
    with path.open("a") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in damaged) + "9" * 5000 + "\n" + "[" * 100_000)
    assert read_rows(path) == rows
