"""Training on a GPU: 16-bit arithmetic learns, and a deterministic run resumes to the same bits."""

import signal
from pathlib import Path

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule, RecipeSpec
from moeut_compose.train.device import Precision
from moeut_compose.train.errors import Interrupted
from moeut_compose.train.loop import Trainer
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_a_skipped_step_leaves_no_trace(spec: ModelSpec, precision: str, graphed: bool) -> None:
    trainer = Trainer(
        build_model(spec, device="cuda", seed=1),
        optimizer=AdamWSpec(lr=1e-2),
        schedule=CosineSchedule(warmup_steps=2),
        steps=10,
        clip_norm=0.25,
        precision=Precision(precision, "cuda"),
        micro_batch=4,
        graphed=graphed,
    )
    batch = torch.randint(0, 120, (8, 17), generator=torch.Generator().manual_seed(0))
    while trainer.train_step(batch)["skipped"]:
        pass  # a float16 loss scale looks for its size
    weight = trainer.model.final_norm.weight
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    clean = weight[0].item()
    with torch.no_grad():
        weight[0] = float("nan")  # in place, so that a recorded graph reads it
    assert trainer.train_step(batch)["skipped"]
    trainer.skips.glance()
    assert trainer.skips.glance() == trainer.skips.read()
    with torch.no_grad():
        weight[0] = clean
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.train_step(batch)["skipped"]
    assert trainer.skips.read().in_a_row == 0


def test_a_recorded_pass_tells_of_repeats_what_an_eager_one_does(spec: ModelSpec) -> None:
    batch = torch.randint(0, 120, (8, 17), generator=torch.Generator().manual_seed(0))
    seen = []
    for graphed in (False, True):
        trainer = Trainer(
            build_model(spec, device="cuda", seed=1),
            optimizer=AdamWSpec(lr=1e-6),
            schedule=CosineSchedule(warmup_steps=0),
            steps=10,
            clip_norm=0.25,
            precision=Precision("fp32", "cuda"),
            micro_batch=4,
            graphed=graphed,
        )
        for _ in range(3):  # replays of one recording must not add up
            trainer.train_step(batch)
        seen.append({name: value for name, value in trainer.seen.items() if name.startswith("repeats.")})
    assert len(seen[0]) == 6
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
