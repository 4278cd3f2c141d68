"""Loss or gradient that is not finite: the step leaves no trace, is counted, and too many of them end the run."""

import copy
import signal
from collections.abc import Callable
from pathlib import Path

import moeut_kernels as mk
import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule, RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.device import Precision
from moeut_compose.train.errors import Interrupted, TrainingDiverged
from moeut_compose.train.loop import Trainer
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.nonfinite import first_nonfinite
from moeut_compose.train.optim import AdamW
from moeut_compose.train.run import load_run, train
from moeut_compose.train.skipping import SkipCounter


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")


def make_trainer(
    spec: ModelSpec, *, fused: bool = False, precision: str = "fp32", clip_norm: float | None = 0.25
) -> Trainer:
    return Trainer(
        build_model(spec, seed=1),
        optimizer=AdamWSpec(lr=1e-2, fused=fused),
        schedule=CosineSchedule(warmup_steps=2),
        steps=100,
        clip_norm=clip_norm,
        precision=Precision(precision, "cpu"),
        micro_batch=4,
    )


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 64, (6, 17), generator=generator) for _ in range(n)]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of weights, buffers and optimiser state."""
    state = {
        f"{name} {key}": value
        for name, entry in trainer.state_dict()["optimizer"].items()
        for key, value in entry.items()
    }
    return copy.deepcopy(trainer.model.state_dict() | state)


def poison_gradient(trainer: Trainer, value: float) -> torch.utils.hooks.RemovableHandle:
    weight = trainer.model.get_parameter("stages.0.layers.0.feedforward.up")
    return weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))


def poison_loss(trainer: Trainer, value: float) -> torch.utils.hooks.RemovableHandle:
    return trainer.model.final_norm.register_forward_hook(
        lambda module, inputs, output: output * value, prepend=True
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clip_norm", [0.25, None], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("poison", [poison_gradient, poison_loss])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_no_trace(
    spec: ModelSpec, poison: Callable, value: float, clip_norm: float | None, fused: bool
) -> None:
    trainer = make_trainer(spec, fused=fused, clip_norm=clip_norm)
    first, second, third = batches(3)
    assert not trainer.train_step(first)["skipped"]
    before = everything(trainer)
    handle = poison(trainer, value)
    assert trainer.train_step(second)["skipped"]
    after = everything(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.step == 2, "the data goes on"
    assert trainer.skips.read() == (1, 1, 1)
    handle.remove()
    assert not trainer.train_step(third)["skipped"]
    assert trainer.skips.read()[:2] == (1, 0)
    assert any(not torch.equal(before[name], value) for name, value in everything(trainer).items())


def test_a_skipped_step_steers_no_router() -> None:
    trainer = make_trainer(load_spec("aux_free_moe_tiny", ["context_length=16", "vocab_size=64"]))
    first, second = batches(2)
    trainer.train_step(first)
    before = everything(trainer)
    poison_loss(trainer, float("nan"))
    trainer.train_step(second)
    after = everything(trainer)
    assert any(name.endswith("selection_bias") for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_float16_scale_that_overflows_is_no_trouble_until_it_is_small(spec: ModelSpec, fused: bool) -> None:
    trainer = make_trainer(spec, fused=fused, precision="fp16")
    handle = poison_gradient(trainer, float("inf"))
    (batch,) = batches(1)
    scale = trainer.state_dict()["scaler"]["scale"]
    assert trainer.train_step(batch)["skipped"]
    assert trainer.state_dict()["scaler"]["scale"] == scale / 2
    assert trainer.skips.read()[:2] == (1, 0)
    while trainer.state_dict()["scaler"]["scale"] > 1:
        trainer.train_step(batch)
    assert trainer.skips.read().in_a_row == 0
    trainer.train_step(batch)
    assert trainer.skips.read() == (trainer.step, 1, trainer.step - 1)
    handle.remove()
    assert not trainer.train_step(batch)["skipped"]


def test_counts_survive_a_checkpoint(spec: ModelSpec) -> None:
    trainer, other = make_trainer(spec), make_trainer(spec)
    poison_loss(trainer, float("nan"))
    for batch in batches(2):
        trainer.train_step(batch)
    other.load_state_dict(trainer.state_dict())
    assert other.skips.read() == trainer.skips.read() == (2, 2, 0)


def test_an_excused_skip_neither_lengthens_nor_ends_a_row() -> None:
    counter, yes, no = SkipCounter(torch.device("cpu")), torch.tensor(True), torch.tensor(False)
    for step, (skipped, excused) in enumerate([(yes, no), (yes, yes), (yes, no), (no, no), (yes, no)]):
        counter.record(step, skipped, excused)
        if step == 2:
            assert counter.glance() == (3, 2, 0)
    assert counter.read() == (4, 1, 4)


def find(trainer: Trainer) -> str | None:
    return trainer.find_nonfinite(batches(1)[0])


def test_the_first_nonfinite_tensor_has_a_name(spec: ModelSpec) -> None:
    trainer = make_trainer(spec)
    before = everything(trainer)
    random_state = torch.get_rng_state()
    assert find(trainer) is None
    handle = poison_gradient(trainer, float("nan"))
    assert find(trainer) == "gradient of stages.0.layers.0.feedforward.up"
    handle.remove()
    router = trainer.model.get_submodule("stages.0.layers.1.feedforward.router")
    handle = router.register_forward_hook(lambda m, i, out: out._replace(gate=out.gate * float("inf")))
    assert find(trainer) == "output of stages.0.layers.1.feedforward.router (SigmoidRouter)"
    handle.remove()
    assert all(torch.equal(before[name], value) for name, value in everything(trainer).items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    with torch.no_grad():
        trainer.model.get_parameter("stages.0.layers.0.feedforward.down")[0, 0, 0] = float("nan")
    assert find(trainer) == "weight stages.0.layers.0.feedforward.down"


def test_norms_that_take_sums_along_have_names_too(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton trains."""
    monkeypatch.setattr(mk, "fans", lambda x: torch.is_grad_enabled())
    trainer = make_trainer(spec)
    norm = trainer.model.get_submodule("stages.0.layers.1.feedforward_norm")
    norm.register_forward_hook(lambda m, i, out: out * float("inf"))
    assert find(trainer) == "output of stages.0.layers.1.feedforward_norm (LayerNorm)"


def test_the_search_leaves_no_hooks(spec: ModelSpec) -> None:
    model = build_model(spec)
    first_nonfinite(model, lambda: None)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[int], bool]) -> None:
    """NaN in the output of the final norm on the batches of the 0-based steps chosen, whenever they are seen."""
    original = Trainer._forward_backward
    steps: dict[bytes, int] = {}

    def forward_backward(self: Trainer, windows: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        step = steps.setdefault(windows.numpy().tobytes(), self.step)
        handle = poison_loss(self, float("nan")) if spoiled(step) else None
        try:
            return original(self, windows, share)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(Trainer, "_forward_backward", forward_backward)


def train_rows(run: Path) -> list[dict]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["event"] in ("train", "skipped")]


def test_rows_count_skips_and_average_over_steps_taken(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, stop_at
) -> None:
    spoil(monkeypatch, lambda step: step in (1, 3, 4, 5))
    reporter = stop_at("", 0, None)
    run = train(spec, recipe, reporter=reporter).folder
    rows = train_rows(run)
    assert [(row["step"], row["event"], row["skipped_steps"]) for row in rows] == [
        (3, "train", 1),
        (6, "skipped", 4),
        (8, "train", 4),
    ]
    assert 0 < rows[0]["cross_entropy"] < 10
    assert "loss" not in rows[1]
    assert rows[1]["grad_norm"] is None
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert "3 of the steps up to step 6 skipped: loss or gradient was not finite" in "\n".join(
        reporter.messages
    )


def test_an_interrupted_run_keeps_its_count(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_at
) -> None:
    spoil(monkeypatch, lambda step: step in (2, 3, 4))
    whole = train(spec, recipe, out=tmp_path / "whole").folder
    out = tmp_path / "stopped"
    reporter = stop_at("training", 4.0, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train(spec, recipe, out=out, reporter=reporter)
    train(spec, recipe, out=out)
    left, right = load_run(whole).model.state_dict(), load_run(out).model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    kept = ("event", "step", "skipped_steps", "loss", "grad_norm")
    assert [[row.get(key) for key in kept] for row in train_rows(whole)] == [
        [row.get(key) for key in kept] for row in train_rows(out)
    ]
    assert train_rows(out)[-1]["skipped_steps"] == 3


def test_too_many_in_a_row_end_the_run(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop_at
) -> None:
    limited = recipe.model_copy(update={"max_skipped_steps": 3})
    spoil(monkeypatch, lambda step: step in (2, 3, 5, 6, 7))
    taken: list[int] = []
    monkeypatch.setattr(AdamW, "step", counted(AdamW.step, taken))
    with pytest.raises(TrainingDiverged) as caught:
        train(spec, limited, out=tmp_path / "run")
    text = str(caught.value)
    assert caught.value.exit_code == 1
    assert text.startswith("training diverged at step 6: 3 steps in a row were skipped")
    assert "first non-finite: output of final_norm" in text
    assert "recipe.seed=3, recipe.order=shuffled, 0-based step 5" in text
    assert f"--resume {tmp_path / 'run'} repeats it from step-00000004" in text
    assert len(taken) == 3
    assert [row["step"] for row in train_rows(tmp_path / "run")] == [3, 6]


def counted(step: Callable, taken: list[int]) -> Callable:
    def counting(self: torch.optim.AdamW, *arguments: object) -> object:
        taken.append(1)
        return step(self, *arguments)

    return counting


def test_a_broken_weight_is_never_saved(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = Trainer.train_step

    def breaking(self: Trainer, batch: torch.Tensor, **options) -> dict[str, torch.Tensor]:
        values = original(self, batch, **options)
        if self.step == 6:
            with torch.no_grad():
                self.model.embedding.weight[3, 3] = float("inf")
        return values

    monkeypatch.setattr(Trainer, "train_step", breaking)
    with pytest.raises(TrainingDiverged, match=r"by step 8: weight embedding\.weight is not finite"):
        train(spec, recipe, out=tmp_path / "run")
    assert load_run(tmp_path / "run").step == 4
