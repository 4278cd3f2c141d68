"""Matching finds the closest value there is, or says why there is none."""

import random

import pytest

from moeut_compose.measure.match import Match, NoMatch, match_spec, quantity
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.problems import SpecError

EXPERTS = "stages.0.layers.0.feedforward.n_experts"
PUBLISHED = {"44m": 155, "126m": 254, "244m": 387, "319m": 338, "728m": 467, "1b": 565}
CLOSEST = {"44m": 156, "126m": 254, "244m": 387, "319m": 340, "728m": 468, "1b": 568}


def around(spec: ModelSpec, result: Match, seq_len: int, reach: int = 40) -> list[tuple[int, int]]:
    """Distance from the target for every valid value near the chosen one."""
    found = []
    (path, chosen), *others = result.values.items()
    for value in range(max(1, chosen - reach), chosen + reach + 1):
        overrides = [f"{path}={value}", *(f"{other}={value * share // chosen}" for other, share in others)]
        try:
            candidate = load_spec(spec.name, overrides)
        except SpecError:
            continue
        found.append((abs(quantity(candidate, result.by, seq_len) - result.target), value))
    return found


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    moeut, dense = load_spec(f"moeut_{size}"), load_spec(f"dense_{size}")
    assert moeut.stages[0].layers[0].feedforward.n_experts == PUBLISHED[size]
    result = match_spec(moeut, dense, by="params")
    assert result.values == {EXPERTS: CLOSEST[size]}
    assert min(around(moeut, result, 1024)) == (abs(result.achieved - result.target), CLOSEST[size])


def test_a_hundred_random_pairs_against_brute_force() -> None:
    generator = random.Random(7)
    fields = {
        "dense_tiny": ["stages.0.layers.0.feedforward.d_ff", "stages.0.layers.0.count"],
        "moeut_tiny": [EXPERTS, "stages.0.layers.0.feedforward.d_expert", "stages.0.repeats"],
        "sigma_moe_tiny": [EXPERTS, "stages.0.layers.0.count"],
        "sut_tiny": [EXPERTS, "stages.0.layers.0.feedforward.d_expert"],
    }
    matched = 0
    while matched < 100:  # pairs that no value fits are drawn again
        name, other = generator.choice(list(fields)), generator.choice(list(fields))
        path, by = generator.choice(fields[name]), generator.choice(["params", "macs", "active"])
        seq_len = generator.choice([16, 100, 256])
        spec, target = load_spec(name), load_spec(other)
        try:
            result = match_spec(spec, target, by=by, vary={path: 1}, seq_len=seq_len, tolerance=10.0)
        except NoMatch:
            continue
        matched += 1
        assert result.achieved == quantity(result.spec, by, seq_len)
        assert min(around(spec, result, seq_len, reach=15))[0] == abs(result.achieved - result.target)


def test_fields_in_proportion() -> None:
    path = "stages.0.layers.0.feedforward."
    spec = load_spec("dense_tiny")
    result = match_spec(spec, load_spec("moeut_tiny"), by="macs", vary={path + "d_ff": 1})
    assert result.spec.stages[0].layers[0].feedforward.d_ff == result.values[path + "d_ff"]
    both = match_spec(
        load_spec("moeut_tiny"),
        load_spec("dense_tiny"),
        by="params",
        vary={EXPERTS: 3, "stages.0.layers.0.mixer.n_experts": 1},
        tolerance=0.2,
    )
    assert both.values[EXPERTS] == 3 * both.values["stages.0.layers.0.mixer.n_experts"]


def test_out_of_reach_is_refused_with_the_reason() -> None:
    with pytest.raises(NoMatch, match="top_k=16 exceeds n_experts=15"):
        match_spec(load_spec("moeut_244m"), load_spec("moeut_tiny"), by="params", vary={EXPERTS: 1})
    with pytest.raises(NoMatch, match="one step of the field changes the count by more"):
        match_spec(
            load_spec("dense_1b"), load_spec("dense_tiny"), by="params", vary={"stages.0.layers.0.count": 1}
        )


@pytest.mark.parametrize(
    "path", ["stages.0.nothing", "stages.7.repeats", "name", "final_norm", "stages.0.pattern"]
)
def test_only_integers_can_vary(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not a field|not an integer"):
        match_spec(load_spec("moeut_tiny"), load_spec("dense_tiny"), by="params", vary={path: 1})
