"""Closed forms against the stored counts; `test_trace.py` holds the closed forms to the built modules."""

import json

import pytest

from moeut_compose.spec.find import list_specs
from tests.measure.golden import FOLDER, counts_of, file_of

NAMES = [found.name for found in list_specs("architectures") if found.builtin]


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_stored_ones(name: str) -> None:
    assert counts_of(name) == json.loads(file_of(name).read_text()), (
        "if this change is meant: python tests/measure/golden.py"
    )


def test_there_is_a_file_for_every_architecture_and_no_other() -> None:
    assert sorted(FOLDER.rglob("*.json")) == sorted(file_of(name) for name in NAMES)
