"""Fresh weights have the published statistics: every tensor of every family, none left out."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec

D, V = 256, 6000
Rule = Callable[[Tensor], None]


def normal(std: float) -> Rule:
    def check(weight: Tensor) -> None:
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert weight.mean().abs() < 4 * std / math.sqrt(weight.numel())
        # a normal distribution, not another one of this deviation
        assert (weight.abs() < std).float().mean().item() == pytest.approx(0.683, abs=0.02)

    return check


def exact(std: float) -> Rule:
    """A truncated normal of exactly this empirical deviation."""

    def check(weight: Tensor) -> None:
        assert weight.std().item() == pytest.approx(std, rel=1e-5)
        # cut at two unit deviations, where the deviation of what remains is 0.88
        assert weight.abs().max().item() == pytest.approx(2 / 0.8796 * std, rel=0.02)

    return check


def uniform(bound: float) -> Rule:
    def check(weight: Tensor) -> None:
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert 0.98 * bound < weight.abs().max() <= bound

    return check


def constant(value: float) -> Rule:
    def check(weight: Tensor) -> None:
        assert (weight == value).all()

    return check


def check_all(model: LanguageModel, rules: dict[str, Rule]) -> None:
    """Each parameter obeys the one rule whose pattern it matches."""
    matched = set()
    for name, parameter in model.named_parameters():
        patterns = [pattern for pattern in rules if re.fullmatch(pattern, name)]
        assert len(patterns) == 1, (name, patterns)
        matched.add(patterns[0])
        try:
            rules[patterns[0]](parameter.detach())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    assert matched == set(rules)


def spec_of(name: str, *overrides: str) -> ModelSpec:
    return load_spec(name, [f"d_model={D}", f"vocab_size={V}", *overrides])


def outside() -> dict[str, Rule]:
    return {
        r"embedding\.weight": normal(1 / math.sqrt(D)),
        r"head\.(weight|bias)": uniform(1 / math.sqrt(D)),
        r".*norm\.weight": constant(1.0),
        r".*norm\.bias": constant(0.0),
    }


def layer(pattern: str) -> str:
    return r"stages\.\d\.layers\.\d+\." + pattern


MOE = ["stages.0.layers.0.feedforward.n_experts=80", "stages.0.layers.0.feedforward.d_expert=48"]
HEADS = ["stages.0.layers.0.mixer.n_experts=10", "stages.0.layers.0.mixer.d_head=40"]


@pytest.mark.parametrize("placement", ["peri", "pre", "post"])
@pytest.mark.parametrize("name", ["moeut_tiny", "sigma_moe_tiny"])
def test_moeut(name: str, placement: str) -> None:
    heads = HEADS if name == "moeut_tiny" else ["stages.0.layers.0.mixer.n_heads=40", HEADS[1]]
    spec = spec_of(name, f"norm.placement={placement}", *MOE, *heads)
    scale = 1.0 if placement == "post" else math.sqrt(2 / 6)
    inner = spec.stages[0].layers[0].mixer.n_heads * 40
    into = normal(scale / math.sqrt(D))
    rules = outside() | {
        layer(r"mixer\.(query|key)\.weight"): into,
        layer(r"mixer\.value"): into,
        layer(r"mixer\.output"): normal(scale / math.sqrt(inner)),
        layer(r"mixer\.(value|output)_router\.weight"): into,
        layer(r"feedforward\.up"): into,
        layer(r"feedforward\.down"): normal(scale / math.sqrt(80 * 48)),
        layer(r"feedforward\.router\.weight"): into,
    }
    check_all(build_model(spec), rules)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_dense(placement: str) -> None:
    width = 300
    size = [f"norm.placement={placement}", f"stages.0.layers.0.feedforward.d_ff={width}"]
    spec = spec_of("dense_tiny", *size, "stages.0.layers.0.mixer.d_head=40")
    scale = 1.0 if placement == "post" else math.sqrt(2 / 6)
    into = exact(scale / math.sqrt(D))
    model = build_model(spec)
    rules = outside() | {
        layer(r"mixer\.query\.weight"): into,
        layer(r"mixer\.(key|value)\.weight"): lambda weight: None,  # drawn together, below
        layer(r"mixer\.output\.weight"): exact(scale / math.sqrt(4 * 40)),
        layer(r"feedforward\.up\.weight"): into,
        layer(r"feedforward\.down\.weight"): exact(scale / math.sqrt(width)),
        layer(r"feedforward\.(up|down)\.bias"): constant(0.0),
    }
    check_all(model, rules)
    for one in model.stages[0].layers:
        into(torch.cat((one.mixer.key.weight, one.mixer.value.weight)).detach())


def test_sut() -> None:
    spec = spec_of("sut_tiny")
    d_attention, d_expert = 64, 128
    kv = math.sqrt(0.5) * math.sqrt(6 / (D + d_attention))
    default = uniform(1 / math.sqrt(D))
    rules = outside() | {
        layer(r"mixer\.query"): uniform(1 / D),
        layer(r"mixer\.output"): uniform(1 / d_attention),
        layer(r"mixer\.(key|value)\.weight"): uniform(kv),
        layer(r"mixer\.position\.table"): constant(0.0),
        layer(r"feedforward\.up"): uniform(1 / D),
        layer(r"feedforward\.down"): uniform(1 / d_expert),
        layer(r"feedforward\.up_bias"): uniform(1 / math.sqrt(d_expert)),
        layer(r"feedforward\.down_bias"): default,
        layer(r"(mixer|feedforward)\.router\.weight"): default,
        layer(r"(mixer|feedforward)\.router\.inner\.weight"): default,
        layer(r"(mixer|feedforward)\.router\.inner\.bias"): small_uniform(1 / math.sqrt(D)),
        r"stages\.0\.halting\.inner\.weight": default,
        r"stages\.0\.halting\.inner\.bias": small_uniform(1 / math.sqrt(D)),
        r"stages\.0\.halting\.outer\.weight": constant(0.0),
    }
    check_all(build_model(spec), rules)


def small_uniform(bound: float) -> Rule:
    """Too few numbers for a deviation within 2 %."""

    def check(weight: Tensor) -> None:
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)

    return check


def test_halting_begins_at_one_half() -> None:
    model = build_model(load_spec("sut_tiny"))
    x = torch.randn(1, 3, 128)
    state = model.stages[0].halting.begin(x)
    alive = model.stages[0].halting.decide(state, 1).alive
    torch.testing.assert_close(alive, torch.full((1, 3), 0.5))


def test_depth_counts_applications_and_not_layers() -> None:
    shallow, deep = (build_model(load_spec("moeut_tiny", [f"stages.0.repeats={n}"])) for n in (3, 12))
    ratio = shallow.stages[0].layers[0].feedforward.up.std() / deep.stages[0].layers[0].feedforward.up.std()
    assert ratio.item() == pytest.approx(2.0, rel=0.02)


def test_seeds_decide() -> None:
    first, same, other = (build_model(load_spec("sut_tiny"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
