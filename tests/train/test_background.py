"""Checkpoints that are written while training goes on are the ones that training would have waited for."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import checkpoint, loop
from moeut_compose.train.background import host_copy
from moeut_compose.train.checkpoint import list_checkpoints, open_checkpoint
from moeut_compose.train.errors import CheckpointError, Interrupted
from moeut_compose.train.run import train


@pytest.fixture
def background(recipe: RecipeSpec) -> RecipeSpec:
    saving = recipe.checkpoint.model_copy(update={"interval": 2, "keep_last": 9, "background": True})
    return recipe.model_copy(update={"checkpoint": saving})


def test_training_goes_on_while_a_checkpoint_is_written(
    spec: ModelSpec, background: RecipeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of step 2 waits for step 3, which a loop that waited for the writer would never take."""
    plain = background.checkpoint.model_copy(update={"background": False})
    waited = train(
        spec, background.model_copy(update={"checkpoint": plain}), out=tmp_path / "waited", device="cpu"
    )
    later = threading.Event()
    step, save = loop.Trainer.train_step, checkpoint.save_file

    def watched_step(self, *args, **options):
        values = step(self, *args, **options)
        if self.step == 3:
            later.set()
        return values

    def slow_save(*args, **options) -> None:
        assert later.wait(30), "training stands still while a checkpoint is written"
        save(*args, **options)

    monkeypatch.setattr(loop.Trainer, "train_step", watched_step)
    monkeypatch.setattr(checkpoint, "save_file", slow_save)
    done = train(spec, background, out=tmp_path / "done", device="cpu")
    left, right = list_checkpoints(waited.folder), list_checkpoints(done.folder)
    assert [path.name for path in left] == [path.name for path in right]
    assert len(left) == 4
    for a, b in zip(left, right, strict=True):
        weights, expected = load_file(b / "model.safetensors"), load_file(a / "model.safetensors")
        assert all(torch.equal(weights[name], expected[name]) for name in expected), (
            "of that step, not of a later one"
        )
        states = [open_checkpoint(path).load_state()["trainer"]["optimizer"] for path in (a, b)]
        assert all(
            torch.equal(states[0][name][key], states[1][name][key])
            for name in states[0]
            for key in states[0][name]
        )


def test_what_goes_wrong_in_the_background_is_told(
    spec: ModelSpec, background: RecipeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*args, **options) -> None:
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot save .*step-00000002.*No space left"):
        train(spec, background, out=tmp_path / "run", device="cpu")
    assert len(calls) == 1


def test_a_stopped_run_leaves_a_whole_checkpoint(
    spec: ModelSpec, background: RecipeSpec, tmp_path: Path, stop_at
) -> None:
    out = tmp_path / "run"
    reporter = stop_at("training", 4.0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        train(spec, background, out=out, device="cpu", reporter=reporter)
    assert open_checkpoint(caught.value.checkpoint).step == 3, "the step in hand is undone"
    whole = train(spec, background, out=tmp_path / "whole", device="cpu")
    resumed = train(spec, background, out=out, device="cpu")
    left, right = (load_file(result.checkpoint / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_copies_share_no_memory() -> None:
    tensor = torch.ones(2)
    state = {"a": [tensor, {"b": tensor}], "c": 1, "d": "x", "e": (tensor,)}
    copied = host_copy(state)
    tensor.zero_()
    assert copied["c"] == 1
    assert copied["d"] == "x"
    assert all(t.sum() == 2 for t in (copied["a"][0], copied["a"][1]["b"], copied["e"][0]))
