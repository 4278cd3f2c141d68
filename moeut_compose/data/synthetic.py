"""Synthetic tasks as training data: window i is example i of a seed, so order and resuming are exact.

Inputs and targets differ, so a window is a pair of rows, and all targets but the answers are ignored.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from moeut_compose.data.errors import DataError
from moeut_compose.data.synthetic_tasks import synthetic_task
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.data.tokens import TokenIndex

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moeut_compose.data.sources import Part
    from moeut_compose.data.synthetic_tasks import SyntheticTask
    from moeut_compose.spec.recipe import SyntheticData

IGNORED = -100
PADDING = 0
FIRST_SYMBOL = 3
"""Ids of symbols follow those of <unk>, <s> and </s>."""
N_WINDOWS = 1 << 31
"""More than any run reads."""
_PARTS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class SyntheticWindows:
    """The examples of one part, each a window of its own."""

    task: SyntheticTask
    seed: int
    part: Part

    @property
    def index(self) -> TokenIndex:
        n_tokens = N_WINDOWS * self.task.spec.longest
        return TokenIndex(n_tokens=n_tokens, n_documents=N_WINDOWS, n_bytes=n_tokens, dtype="<i8")

    def n_windows(self, context: int) -> int:
        """Windows of `context` inputs and as many targets. Raises `DataError` if an example is longer."""
        if context < self.task.spec.longest:
            raise DataError(
                f"an example of {self.task.spec.kind} has up to {self.task.spec.longest} tokens, and a window "
                f"{context}; raise the context or make the task shorter"
            )
        return N_WINDOWS

    def windows(self, indices: Iterable[int], context: int) -> np.ndarray:
        """Pairs of inputs and targets by number: `[n, 2, context]` int64, padded on the right."""
        rows = []
        for index in indices:
            draw = np.random.default_rng((self.seed, _PARTS[self.part], index))
            rows.append(pair(*self.task.example(draw, self.task.draw_difficulty(draw)), context))
        return np.stack(rows)


def pair(symbols: list[int], answers: dict[int, int], length: int) -> np.ndarray:
    """Ids and targets `[2, length]` of symbols and the answers at some of their places."""
    window = np.full((2, length), IGNORED, dtype=np.int64)
    window[0] = PADDING
    window[0, : len(symbols)] = np.asarray(symbols) + FIRST_SYMBOL
    for place, answer in answers.items():
        window[1, place] = answer + FIRST_SYMBOL
    return window


def held_back_examples(
    task: SyntheticTask, seed: int, difficulty: int, n: int
) -> list[tuple[list[int], dict[int, int]]]:
    """The first `n` test examples of a difficulty."""
    draws = (np.random.default_rng((seed, _PARTS["test"], difficulty, index)) for index in range(n))
    return [task.example(draw, difficulty) for draw in draws]


def synthetic_windows(data: SyntheticData, part: Part) -> SyntheticWindows:
    """The examples of one part of a recipe's task."""
    return SyntheticWindows(synthetic_task(data.task, data.seed), data.seed, part)


def synthetic_identity(data: SyntheticData) -> str:
    """Equal for equal examples."""
    return hashlib.sha256(f"synthetic {data.model_dump_json()}".encode()).hexdigest()[:24]


def alphabet_tokenizer(task: SyntheticTask, *, vocab_size: int) -> Tokenizer:
    """A SentencePiece model with a piece for each symbol. Raises `DataError` if there are more than `vocab_size`."""
    n_pieces = FIRST_SYMBOL + len(task.symbols) + 1
    if n_pieces > vocab_size:
        raise DataError(
            f"{task.spec.kind} has {n_pieces} tokens but the architecture's vocab_size is {vocab_size}; "
            f"set vocab_size={n_pieces}"
        )
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["?"]),  # a text is asked for, and must hold a character that is no symbol
        model_writer=output,
        model_type="char",
        vocab_size=n_pieces,
        user_defined_symbols=list(task.symbols),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(output.getvalue())
