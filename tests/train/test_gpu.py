"""Training on a GPU: 16-bit arithmetic learns, and a deterministic run resumes to the same bits."""

import signal
from pathlib import Path

import pytest
import torch

from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, RecipeSpec
from moeut_compose.train.errors import Interrupted
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import load_run, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_lowers_the_loss(spec: ModelSpec, recipe: RecipeSpec, precision: str) -> None:
    changes = {"precision": precision, "steps": 60, "optimizer": AdamWSpec(lr=1e-2)}
    result = train(spec, recipe.model_copy(update=changes), device="cuda")
    rows = [row for row in read_rows(result.folder / "metrics.jsonl") if row["event"] == "train"]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 1
    assert rows[-1]["memory_bytes"] > 0
    assert {p.dtype for p in load_run(result.folder, device="cuda").model.parameters()} == {torch.float32}


def test_a_deterministic_run_resumes_to_the_same_bits(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path, stop_at
) -> None:
    exact = recipe.model_copy(update={"deterministic": True, "precision": "bf16"})
    whole = train(spec, exact, out=tmp_path / "whole", device="cuda").folder
    stopped = tmp_path / "stopped"
    reporter = stop_at("training", 4.5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(spec, exact, out=stopped, device="cuda", reporter=reporter)
    train(spec, exact, out=stopped, device="cuda")
    left, right = (load_run(run).model.state_dict() for run in (whole, stopped))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_micro_batch_shrinks_when_memory_runs_out(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, stop_at
) -> None:
    from moeut_compose.train.loop import Trainer

    original = Trainer.train_step

    def short_of_memory(self: Trainer, batch: torch.Tensor, **options) -> dict[str, torch.Tensor]:
        if self.micro_batch > 2:
            torch.empty(2**50, device="cuda")
        return original(self, batch, **options)

    monkeypatch.setattr(Trainer, "train_step", short_of_memory)
    reporter = stop_at("", 0, None)
    batch = recipe.batch.model_copy(update={"micro": "auto"})
    assert train(spec, recipe.model_copy(update={"batch": batch}), device="cuda", reporter=reporter).step == 8
    assert "out of memory; going on with micro-batches of 2 sequences" in reporter.messages
