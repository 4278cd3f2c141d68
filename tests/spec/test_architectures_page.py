"""docs/architectures.md names every built-in architecture with its right numbers."""

import re
from pathlib import Path

import pytest

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.find import list_specs
from moeut_compose.spec.io import load_spec

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
ROWS = {
    name: (int(params.replace(",", "")), int(macs.replace(",", "")))
    for name, params, macs in re.findall(r"\| `([\w/]+)` \| ([\d,]+) \| ([\d,]+) \|", PAGE)
}


def test_every_architecture_has_a_row() -> None:
    assert ROWS.keys() == {found.name for found in list_specs("architectures")}


@pytest.mark.parametrize("name", ROWS)
def test_numbers(name: str) -> None:
    spec = load_spec(name)
    assert ROWS[name] == (count_params(spec).total, count_macs(spec).total_per_token)


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith("_tiny")])
def test_small_ones_are_matched(name: str) -> None:
    spec, reference = load_spec(name), load_spec("moeut_tiny")
    assert spec.num_params() == pytest.approx(reference.num_params(), rel=0.025)
    assert spec.num_params() < 3_000_000
    assert (spec.vocab_size, spec.context_length) == (reference.vocab_size, reference.context_length)
