"""The plan: numbers only, no data, and a batch that fits."""

import json
from pathlib import Path

import pytest
import torch

from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import BatchSpec, RecipeSpec
from moeut_compose.train import plan as module
from moeut_compose.train.device import choose_precision
from moeut_compose.train.errors import TrainError
from moeut_compose.train.memory import Activations, choose_micro_batch, trace_activations
from moeut_compose.train.plan import plan_training


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trace_activations", trace_activations)
    monkeypatch.setattr(module, "free_memory", lambda device: 32 * 2**30)


def test_the_numbers_of_a_paper_run_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "cache"))
    plan = plan_training(load_spec("moeut_244m"), load_recipe("paper"), device="cpu")
    assert (plan.params, plan.steps, plan.tokens) == (243_326_784, 100_000, 6_553_600_000)
    assert plan.macs_per_token == 159_602_688 + 8_192_000
    assert (plan.context, plan.batch_size, plan.tokens_per_step) == (1024, 64, 65_536)
    assert plan.micro_batch * plan.accumulation >= 64 > plan.micro_batch * (plan.accumulation - 1)
    assert plan.memory.weights + plan.memory.optimizer + plan.memory.gradients == 16 * plan.params
    assert plan.seconds == pytest.approx(6.5536e9 * 6 * plan.macs_per_token / (1e11 * 0.35))
    assert plan.lr_curve[0] == (0, pytest.approx(6.25e-8))
    assert (4000, 2.5e-4) in plan.lr_curve
    assert plan.lr_curve[-1] == (99_999, pytest.approx(2.5888e-5, rel=1e-4))
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["total"] == plan.memory.total
    assert plan.memory_checkpointed.activations < plan.memory_selective.activations < plan.memory.activations
    assert not (tmp_path / "cache").exists()


def test_context_of_the_recipe(spec: ModelSpec, recipe: RecipeSpec) -> None:
    assert plan_training(spec, recipe.model_copy(update={"context": 8}), device="cpu").tokens_per_step == 48
    with pytest.raises(TrainError, match=r"recipe\.context=32 exceeds the architecture's context_length=16"):
        plan_training(spec, recipe.model_copy(update={"context": 32}), device="cpu")


def test_notes_name_what_will_surprise(spec: ModelSpec) -> None:
    recipe = load_recipe("paper", ["steps=200"])
    (note,) = plan_training(spec, recipe, device="cpu").notes
    assert "the warm-up (4000 steps) is not shorter than the run (200 steps)" in note
    repeating = load_recipe("paper", ["data.max_tokens=1000"])
    assert any(
        "repeat the 1,000 tokens" in note for note in plan_training(spec, repeating, device="cpu").notes
    )


def test_an_explicit_micro_batch_is_kept(spec: ModelSpec, recipe: RecipeSpec) -> None:
    plan = plan_training(spec, recipe, device="cpu")
    assert (plan.micro_batch, plan.accumulation) == (4, 2)


def test_activation_checkpointing_makes_room_for_larger_parts(
    spec: ModelSpec, recipe: RecipeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batch follows from what the chosen mode keeps; the memory told is that of this mode."""
    monkeypatch.setattr(module, "choose_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(module, "describe_device", str)
    monkeypatch.setattr(module, "free_memory", lambda device: 16 * 2**20)
    automatic = recipe.model_copy(update={"batch": BatchSpec(size=960), "precision": "bf16"})
    plans = [
        plan_training(spec, automatic.model_copy(update={"activation_checkpointing": mode}))
        for mode in ("none", "selective", "full")
    ]
    none, selective, full = plans
    assert none.micro_batch <= selective.micro_batch <= full.micro_batch
    assert none.micro_batch < full.micro_batch
    assert selective.memory == selective.memory_selective
    assert full.memory == full.memory_checkpointed
    assert all(plan.memory.total < 16 * 2**20 for plan in plans)


@pytest.mark.parametrize(
    ("batch_size", "free_gib", "expected"),
    [(64, 1000, 64), (64, 41, 32), (64, 39, 16), (64, 5, 1), (61, 39, 31)],
)
def test_the_micro_batch_is_the_largest_part_that_fits(batch_size: int, free_gib: int, expected: int) -> None:
    micro = choose_micro_batch(
        batch_size,
        activations=Activations(fixed=0, per_sequence=2**30),
        n_params=250_000_000,
        context=1024,
        device=torch.device("cuda"),
        free=free_gib * 2**30,
    )
    assert micro == expected


def test_precision() -> None:
    assert choose_precision("auto", torch.device("cpu")).name == "fp32"
    assert choose_precision("bf16", torch.device("cpu")).name == "bf16"
    assert not choose_precision("bf16", torch.device("cpu")).scaler().is_enabled()
