"""All statistics over a text: the same whatever the batch, in agreement with what models themselves report."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from moeut_compose.analyze.collect import Figures, observe_model
from moeut_compose.analyze.diversity import Place
from moeut_compose.analyze.left_out import NO_HALTING, NO_REPEATS, NO_ROUTERS, NO_SHARED, left_out
from moeut_compose.data.tokens import TokenFile
from moeut_compose.evaluate.perplexity import measure_perplexity

from .conftest import CONTEXT, FAMILIES, make


def look(name: str, text: TokenFile, **options: Any) -> Figures:
    model, spec = make(name)
    return observe_model(model, spec, text, context=CONTEXT, **options)


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Equal but for rounding, through dataclasses and sequences; of places that weigh the same, any will do."""
    if isinstance(left, Place):
        assert left.gate == pytest.approx(right.gate, rel=1e-4), path
    elif is_dataclass(left):
        for field in fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name), f"{path}.{field.name}")
    elif isinstance(left, dict):
        assert_same(list(left.values()), list(right.values()), path)
    elif isinstance(left, list | tuple) and left and not isinstance(left[0], int | float):
        assert len(left) == len(right), path
        for one, other in zip(left, right, strict=True):
            assert_same(one, other, path)
    elif isinstance(left, np.ndarray | int | float):
        assert_allclose(left, right, rtol=1e-4, atol=1e-6, err_msg=path)
    else:
        assert left == right, path


@pytest.mark.parametrize("name", ["moeut_tiny", "moeut_act_tiny", "remoe_tiny"])
def test_nothing_depends_on_the_batch_size(name: str, text: TokenFile) -> None:
    assert_same(look(name, text, batch_size=1), look(name, text, batch_size=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, text: TokenFile) -> None:
    model, spec = make(name)
    seen = observe_model(model, spec, text, context=CONTEXT, windows=4)
    expected = measure_perplexity(model, text, context=CONTEXT, windows=4)
    assert seen.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
    assert len(seen.steps) == len(seen.residual.update) == spec.depth
    assert np.isfinite(seen.residual.update).all()
    assert_allclose(np.diag(seen.similarity.states), 1, rtol=1e-5)
    for router in seen.routers:
        assert router.usage.tokens[0] == 4 * CONTEXT
        uses = (router.usage.share * router.usage.tokens[:, None, None]).sum()
        assert sum(expert.uses for expert in router.diversity.experts) == pytest.approx(uses)
        assert_allclose(router.pairs.counts[0].diagonal().sum(), uses / router.n_heads, rtol=0.5)
    missing = left_out(seen)
    routes = name not in ("dense_tiny", "universal_transformer_tiny", "looped_tiny", "relaxed_recursive_tiny")
    assert (missing.get("load") == NO_ROUTERS) != routes
    assert bool(seen.depths) == (missing.get("halting") != NO_HALTING)
    assert bool(seen.curves) == (missing.get("loss_by_repeats") != NO_REPEATS)


def test_unshared_experts_have_no_depths_to_compare(text: TokenFile) -> None:
    missing = left_out(look("sigma_moe_tiny", text, windows=1))
    assert missing["overlap"] == missing["expert_depth"] == NO_SHARED
    assert "load" not in missing


@pytest.mark.parametrize("name", ["sut_tiny", "moeut_act_tiny", "universal_transformer_tiny"])
def test_depths_are_those_that_the_halting_rule_reports(name: str, text: TokenFile) -> None:
    model, spec = make(name)
    with torch.no_grad():
        for weight in model.stages[0].halting.parameters():
            weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    seen = observe_model(model, spec, text, context=CONTEXT)
    ids = torch.from_numpy(text.windows(range(seen.windows), CONTEXT))[:, :-1]
    with torch.no_grad():
        stats = model(ids).stats
    reported = stats["stages.0.halting.passes"].sum() / stats["stages.0.halting.tokens"].sum()
    assert seen.depths[0].mean == pytest.approx(
        reported.item(), rel=2e-3
    )  # mass below the threshold is dropped
    assert 1.05 < seen.depths[0].mean < spec.stages[0].repeats
    assert seen.depths[0].passes.sum() == seen.tokens


def test_a_stage_that_is_not_the_first_has_its_own_names(text: TokenFile) -> None:
    seen = look("looped_tiny", text, windows=1)
    assert [(step.stage, step.member, step.repeat) for step in seen.steps[:3]] == [
        (0, 0, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_the_mode_of_the_model_is_put_back(text: TokenFile) -> None:
    model, spec = make("moeut_tiny")
    model.train()
    observe_model(model, spec, text, context=CONTEXT, windows=1)
    assert model.training


def test_too_short_a_text(text: TokenFile) -> None:
    model, spec = make("dense_tiny")
    with pytest.raises(ValueError, match="less than one window of 500"):
        observe_model(model, spec, text, context=500)
