"""What synthetic tasks ask: symbols, and the answers at some of their places.

An example of a difficulty is a pure function of its random generator. The last answer is the one that is scored.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Protocol, assert_never

import numpy as np

from moeut_compose.spec.synthetic import FunctionChainSpec, PHopSpec, WordProblemSpec

if TYPE_CHECKING:
    from moeut_compose.spec.synthetic import SyntheticTaskSpec

Example = tuple[list[int], dict[int, int]]
"""Symbols by their number, and answers by their place."""
_TABLES = 3
"""Tells the generator of tables from those of examples."""


class SyntheticTask(Protocol):
    """A task with its tables."""

    @property
    def spec(self) -> SyntheticTaskSpec:
        """What was asked for."""

    @property
    def symbols(self) -> str:
        """A character for each symbol."""

    @property
    def difficulties(self) -> tuple[list[int], list[int]]:
        """Those of training, and harder ones."""

    def draw_difficulty(self, draw: np.random.Generator) -> int:
        """The difficulty of a training example."""

    def example(self, draw: np.random.Generator, difficulty: int) -> Example:
        """One example."""

    def chance(self, example: Example) -> float:
        """Probability that the best known shortcut gets the last answer."""


def synthetic_task(spec: SyntheticTaskSpec, seed: int) -> SyntheticTask:
    """A task with tables from a seed."""
    match spec:
        case FunctionChainSpec():
            draw = np.random.default_rng((seed, _TABLES))
            tables = [[int(y) for y in draw.permutation(spec.n_symbols)] for _ in range(spec.n_functions)]
            return FunctionChain(spec, tables)
        case PHopSpec():
            return PHop(spec)
        case WordProblemSpec():
            return WordProblem(spec, group_elements(spec.group))
        case _:
            assert_never(spec)


@dataclass(frozen=True)
class FunctionChain:
    """Functions are bijections, so that answers are uniform for every depth."""

    spec: FunctionChainSpec
    tables: list[list[int]]
    """The value of each function at each symbol."""

    @property
    def symbols(self) -> str:
        upper, lower = string.ascii_uppercase[: self.spec.n_symbols], string.ascii_lowercase
        return upper + lower[: self.spec.n_functions] + "="

    @property
    def difficulties(self) -> tuple[list[int], list[int]]:
        depth = self.spec.max_depth
        return list(range(1, depth + 1)), list(range(depth + 1, 2 * depth + 1))

    def draw_difficulty(self, draw: np.random.Generator) -> int:
        return int(draw.integers(1, self.spec.max_depth + 1))

    def example(self, draw: np.random.Generator, difficulty: int) -> Example:
        value = int(draw.integers(self.spec.n_symbols))
        chain = [int(f) for f in draw.integers(self.spec.n_functions, size=difficulty)]
        symbols = [value, *(self.spec.n_symbols + f for f in chain), len(self.symbols) - 1]
        for f in chain:
            value = self.tables[f][value]
        return symbols, {len(symbols) - 1: value}

    def chance(self, example: Example) -> float:
        return 1 / self.spec.n_symbols


@dataclass(frozen=True)
class PHop:
    """Hops lead back through the text; with two hops less the answer is often the same, which is the shortcut."""

    spec: PHopSpec

    @property
    def symbols(self) -> str:
        return string.ascii_lowercase[: self.spec.n_symbols]

    @property
    def difficulties(self) -> tuple[list[int], list[int]]:
        return [self.spec.length], [3 * self.spec.length // 2, 2 * self.spec.length]

    def draw_difficulty(self, draw: np.random.Generator) -> int:
        return self.spec.length

    def example(self, draw: np.random.Generator, difficulty: int) -> Example:
        """Drawn again until the hops of the last token are defined."""
        while True:
            steps = draw.integers(1, self.spec.n_symbols, size=difficulty)  # never 0: neighbours differ
            symbols = [int(symbol) for symbol in np.cumsum(steps) % self.spec.n_symbols]
            answers = hop_answers(symbols, self.spec.n_hops)
            if difficulty - 1 in answers:
                return symbols, answers

    def chance(self, example: Example) -> float:
        symbols, answers = example
        last = len(symbols) - 1
        if self.spec.n_hops < 2:
            return 1 / self.spec.n_symbols
        return float(hop_answers(symbols, self.spec.n_hops - 2)[last] == answers[last])


def hop_answers(symbols: list[int], n_hops: int) -> dict[int, int]:
    """The symbol after `n_hops` hops from each place where they are defined.

    A hop from place i leads to the place after the latest earlier occurrence of the symbol at i.
    """
    latest: dict[int, int] = {}
    hop: list[int | None] = []
    for place, symbol in enumerate(symbols):
        hop.append(latest[symbol] + 1 if symbol in latest else None)
        latest[symbol] = place
    answers = {}
    for place in range(len(symbols)):
        end: int | None = place
        for _ in range(n_hops):
            end = None if end is None else hop[end]
        if end is not None:
            answers[place] = symbols[end]
    return answers


@dataclass(frozen=True)
class WordProblem:
    """Elements are permutations, applied from left to right."""

    spec: WordProblemSpec
    elements: list[tuple[int, ...]]

    @property
    def symbols(self) -> str:
        plain = string.ascii_letters + string.digits
        return (plain + "".join(map(chr, range(0xC0, 0x180))))[: len(self.elements)]

    @property
    def difficulties(self) -> tuple[list[int], list[int]]:
        return [self.spec.length], [3 * self.spec.length // 2, 2 * self.spec.length]

    def draw_difficulty(self, draw: np.random.Generator) -> int:
        return self.spec.length

    def example(self, draw: np.random.Generator, difficulty: int) -> Example:
        symbols = [int(symbol) for symbol in draw.integers(len(self.elements), size=difficulty)]
        numbers = {element: number for number, element in enumerate(self.elements)}
        product = tuple(range(len(self.elements[0])))
        answers = {}
        for place, symbol in enumerate(symbols):
            product = tuple(self.elements[symbol][i] for i in product)
            answers[place] = numbers[product]
        return symbols, answers

    def chance(self, example: Example) -> float:
        """Of knowing the product in the largest abelian quotient: the sign in S3, S4 and S5, a third in A4."""
        quotient = {"S3": 2, "S4": 2, "S5": 2, "A4": 3}.get(self.spec.group, 1)
        return quotient / len(self.elements)


def group_elements(name: str) -> list[tuple[int, ...]]:
    """The permutations of a group, the identity first."""
    n = int(name[1:])
    everything = list(permutations(range(n)))
    return [p for p in everything if is_even(p)] if name[0] == "A" else everything


def is_even(permutation: tuple[int, ...]) -> bool:
    """Whether the number of pairs in the wrong order is even."""
    pairs = ((i, j) for j in range(len(permutation)) for i in range(j))
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 0
