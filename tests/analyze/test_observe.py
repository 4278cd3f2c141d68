"""Observing sees every call once, and changes nothing."""

from itertools import pairwise

import pytest
import torch

from moeut_compose.analyze.observe import observing, role_of
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.spec.stages import schedule

from .conftest import CONTEXT, FAMILIES, VOCABULARY, make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


def n_hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_application_is_seen_and_the_output_is_the_same(name: str, ids: torch.Tensor) -> None:
    model, spec = make(name)
    with torch.no_grad():
        expected = model(ids).logits
        with observing(model) as seen:
            assert torch.equal(model(ids).logits, expected)
    assert [(one.stage, one.member, one.repeat) for one in seen] == schedule(spec.stages)
    assert n_hooks(model) == 0
    for earlier, later in pairwise(seen):
        if (
            spec.stages[0].halting.kind == "none"
            and spec.stages[0].inject.kind == "none"
            and len(spec.stages) == 1
        ):
            assert torch.equal(earlier.after, later.before)


def test_choices_are_those_of_the_routers(ids: torch.Tensor) -> None:
    model, _ = make("moeut_tiny")
    layer = model.stages[0].layers[1]
    with torch.no_grad(), observing(model) as seen:
        model(ids)
    last = seen[-1]
    assert set(last.choices) == {"mixer.value_router", "mixer.output_router", "feedforward.router"}
    read = layer.feedforward_norm(last.before + last.mixed)
    choice = last.choices["feedforward.router"]
    scores = layer.feedforward.router.logits(read).detach()
    assert torch.allclose(choice.logits, scores, atol=1e-6)
    best = scores.topk(3, dim=-1)
    assert torch.equal(choice.gate > 0, torch.zeros_like(scores).scatter(-1, best.indices, 1.0) > 0)
    assert torch.allclose(choice.gate.gather(-1, best.indices), best.values.sigmoid(), atol=1e-6)
    assert torch.allclose(last.after, last.before + last.mixed + last.transformed, atol=1e-5)


def test_tokens_at_rest_run_nowhere(ids: torch.Tensor) -> None:
    model, _ = make("sut_tiny")
    rule = model.stages[0].halting
    with torch.no_grad(), observing(model) as seen:
        rule.outer.weight.normal_(std=30.0)  # decide at once, either way
        model(ids)
    rests = ~seen[-1].runs
    assert rests.any()
    for choice in seen[-1].choices.values():
        assert torch.equal(~choice.runs, rests)
        assert not choice.gate[rests].any()


def test_hooks_go_when_the_model_fails(ids: torch.Tensor) -> None:
    model, _ = make("dense_tiny")
    with pytest.raises(IndexError), observing(model):
        model(ids + VOCABULARY)
    assert n_hooks(model) == 0


def test_routers_of_single_passes_count_as_one() -> None:
    assert role_of("feedforward.routers.2") == role_of("feedforward.routers.0") == "feedforward.routers"
    assert role_of("mixer.value_router") == "mixer.value_router"
