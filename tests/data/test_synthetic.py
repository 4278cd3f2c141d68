"""Synthetic tasks: answers against slow definitions, and windows that depend on seed and number alone."""

import json
from itertools import pairwise, permutations

import numpy as np
import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.data.prepare import prepare_data
from moeut_compose.data.synthetic import (
    FIRST_SYMBOL,
    IGNORED,
    alphabet_tokenizer,
    held_back_examples,
    synthetic_windows,
)
from moeut_compose.data.synthetic_tasks import group_elements, hop_answers, is_even, synthetic_task
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.spec.io import load_recipe
from moeut_compose.spec.recipe import SyntheticData
from moeut_compose.spec.synthetic import FunctionChainSpec, PHopSpec, SyntheticTaskSpec, WordProblemSpec

TASKS: list[SyntheticTaskSpec] = [
    FunctionChainSpec(),
    PHopSpec(n_hops=2, length=20),
    WordProblemSpec(group="A4"),
]


def draws(n: int):
    return (np.random.default_rng(index) for index in range(n))


def test_chains_apply_their_functions_in_order() -> None:
    task = synthetic_task(FunctionChainSpec(n_symbols=5, n_functions=3, max_depth=6), seed=2)
    tables = task.tables  # type: ignore[attr-defined]
    assert all(sorted(table) == list(range(5)) for table in tables)
    for draw in draws(50):
        symbols, answers = task.example(draw, 4)
        value, *chain, end = symbols
        for f in chain:
            value = tables[f - 5][value]
        assert (len(chain), task.symbols[end], answers) == (4, "=", {5: value})


def slow_hop(symbols: list[int], place: int) -> int | None:
    earlier = [t for t in range(place) if symbols[t] == symbols[place]]
    return max(earlier) + 1 if earlier else None


def test_hops_follow_their_definition() -> None:
    task = synthetic_task(PHopSpec(n_symbols=4, n_hops=3, length=24), seed=0)
    for draw in draws(50):
        symbols, answers = task.example(draw, 24)
        assert all(one != other for one, other in pairwise(symbols))
        for place in range(24):
            end: int | None = place
            for _ in range(3):
                end = None if end is None else slow_hop(symbols, end)
            assert answers.get(place) == (None if end is None else symbols[end])
        assert 23 in answers


def test_the_shortcut_of_two_hops_less() -> None:
    """The published figure for 4 symbols, 32 places and 4 hops is .508."""
    task = synthetic_task(PHopSpec(n_symbols=4, n_hops=4, length=32), seed=0)
    chances = [task.chance(task.example(draw, 32)) for draw in draws(2000)]
    assert np.mean(chances) == pytest.approx(0.508, abs=0.035)
    assert hop_answers([0, 1, 0, 2], 0) == {0: 0, 1: 1, 2: 0, 3: 2}


@pytest.mark.parametrize(
    ("name", "order"), [("Z2", 2), ("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60), ("S5", 120)]
)
def test_groups_are_closed_and_answers_their_products(name: str, order: int) -> None:
    elements = group_elements(name)
    assert len(set(elements)) == order
    assert elements[0] == tuple(sorted(elements[0]))
    task = synthetic_task(WordProblemSpec(group=name, length=9), seed=0)  # type: ignore[arg-type]
    assert len(set(task.symbols)) == order
    for draw in draws(10):
        symbols, answers = task.example(draw, 9)
        for place in range(9):
            points = list(range(len(elements[0])))
            for symbol in symbols[: place + 1]:
                points = [elements[symbol][point] for point in points]
            # points[i] is where i ends after all permutations up to here
            assert elements[answers[place]] == tuple(points)


def test_even_permutations_are_half_of_all() -> None:
    assert sum(is_even(p) for p in permutations(range(5))) == 60
    assert not is_even((1, 0, 2))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_windows_depend_on_seed_part_and_number_alone(task: SyntheticTaskSpec) -> None:
    data = SyntheticData(task=task, seed=5)
    train = synthetic_windows(data, "train")
    first = train.windows([3, 0, 2**31 - 1], 24)
    assert first.shape == (3, 2, 24)
    assert np.array_equal(synthetic_windows(data, "train").windows([0, 3], 24), first[[1, 0]])
    for other in (
        synthetic_windows(data, "validation"),
        synthetic_windows(data.model_copy(update={"seed": 6}), "train"),
    ):
        assert not np.array_equal(other.windows([3, 0], 24), first[:2])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_only_answers_are_targets(task: SyntheticTaskSpec) -> None:
    train = synthetic_windows(SyntheticData(task=task), "train")
    for inputs, targets in train.windows(range(20), 24):
        ids, answers = inputs[inputs != 0], np.flatnonzero(targets != IGNORED)
        assert 0 < len(answers) <= len(ids) <= task.longest
        assert answers[-1] == len(ids) - 1
        assert ids.min() >= FIRST_SYMBOL
        assert (inputs[len(ids) :] == 0).all()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_the_alphabet_is_a_tokenizer(task: SyntheticTaskSpec, tmp_path) -> None:
    made = synthetic_task(task, 0)
    alphabet_tokenizer(made, vocab_size=32).save(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    ids = list(range(FIRST_SYMBOL, FIRST_SYMBOL + len(made.symbols)))
    assert tokenizer.encode(made.symbols) == ids
    assert tokenizer.decode(ids) == made.symbols


def test_test_examples_are_the_same_for_every_run() -> None:
    data = SyntheticData(task=TASKS[0])
    task = synthetic_task(data.task, data.seed)
    examples = held_back_examples(task, data.seed, 3, 4)
    assert examples == held_back_examples(task, data.seed, 3, 6)[:4]
    assert json.dumps(examples) != json.dumps(held_back_examples(task, data.seed + 1, 3, 4))


def test_what_does_not_fit_is_refused() -> None:
    recipe = load_recipe("synthetic_p_hop")
    with pytest.raises(DataError, match="p_hop has up to 32 tokens, and a window 31; raise the context"):
        prepare_data(recipe, vocab_size=32, context=31)
    with pytest.raises(
        DataError, match="p_hop has 8 tokens but the architecture's vocab_size is 7; set vocab_size=8"
    ):
        prepare_data(recipe, vocab_size=7, context=32)
