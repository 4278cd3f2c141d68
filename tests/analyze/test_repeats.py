"""Fewer and more passes: the model is the one that a changed spec would build, and is put back afterwards."""

import pytest
import torch

from moeut_compose.analyze.repeats import loss_by_repeats, most_repeats, repeats_to_try, running_repeats
from moeut_compose.build import build_model
from moeut_compose.data.tokens import TokenFile
from moeut_compose.evaluate.perplexity import measure_perplexity
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.find import list_specs
from moeut_compose.spec.io import load_spec

from .conftest import CONTEXT, FAMILIES, make

TINY = [listed.name for listed in list_specs("architectures") if listed.name.endswith("_tiny")]


@pytest.mark.parametrize("name", ["moeut_tiny", "sut_tiny", "looped_tiny", "universal_transformer_tiny"])
@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_equals_the_model_of_a_spec_with_that_number(name: str, repeats: int) -> None:
    model, spec = make(name)
    stage = next(index for index, stage in enumerate(spec.stages) if stage.repeats > 1)
    changed = load_spec(name, [*FAMILIES[name], f"stages.{stage}.repeats={repeats}"])
    rebuilt = build_model(changed).eval()
    rebuilt.load_state_dict(model.state_dict())
    ids = torch.arange(CONTEXT)[None]
    with torch.no_grad():
        before = model(ids).logits
        with running_repeats(model, spec, stage, repeats):
            assert torch.equal(model(ids).logits, rebuilt(ids).logits)
        assert torch.equal(model(ids).logits, before)


def test_pattern_aabb_repeats_each_member_in_place() -> None:
    model, spec = make("moeut_tiny", "stages.0.pattern=AABB")
    with running_repeats(model, spec, 0, 2):
        assert model.stages[0].schedule == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert len(model.stages[0].schedule) == 6


@pytest.mark.parametrize("name", TINY)
def test_no_architecture_runs_out_of_weights(name: str) -> None:
    """Whatever has weights of its own for each pass must be known to `most_repeats`."""
    model, spec = make(name)
    ids = torch.arange(CONTEXT)[None]
    for index, stage in enumerate(spec.stages):
        limit = most_repeats(stage)
        with running_repeats(model, spec, index, limit or stage.repeats + 1), torch.no_grad():
            assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    "change",
    ["stages.0.norms=per_repeat", "stages.0.lora={rank: 2}", "stages.0.step={kind: learned}"],
)
def test_weights_of_each_pass_are_a_bound(change: str) -> None:
    model, spec = make("dense_tiny", "stages.0.repeats=3", change)
    assert most_repeats(spec.stages[0]) == 3
    with (
        pytest.raises(ValueError, match=r"stage 0 cannot run repeats=4; the number must be between 1 and 3"),
        running_repeats(model, spec, 0, 4),
    ):
        pass


def test_which_numbers_are_tried() -> None:
    assert repeats_to_try(3, None) == [1, 2, 3, 4, 5, 6]
    assert repeats_to_try(3, 3) == [1, 2, 3]
    assert repeats_to_try(9, None) == [*range(1, 11), 12, 14, 18]
    many = repeats_to_try(40, None)
    assert {1, 40, 41, 50, 60, 80} <= set(many)
    assert len(many) <= 16


def test_losses_are_those_of_the_evaluation(text: TokenFile) -> None:
    model, spec = make("looped_tiny")
    (curve,) = loss_by_repeats(
        model, spec, text, context=CONTEXT, windows=3, batch_size=2, reporter=SilentReporter()
    )
    assert (curve.stage, curve.trained, curve.limit) == (1, 4, None)
    at = {point.repeats: point.cross_entropy for point in curve.points}
    trained = measure_perplexity(model, text, context=CONTEXT, windows=3, batch_size=2)
    assert at[4] == trained.cross_entropy
    assert len(set(at.values())) == len(at)


def test_a_model_without_repeats_has_no_curve(text: TokenFile) -> None:
    model, spec = make("dense_tiny")
    assert (
        loss_by_repeats(
            model, spec, text, context=CONTEXT, windows=1, batch_size=1, reporter=SilentReporter()
        )
        == []
    )
