"""From texts to passages as lm-evaluation-harness cuts them: continuations of a context, and whole documents.

A context and its continuation are tokenised as one text, and the continuation's tokens are those after as many as the
context has alone; before them the model reads the tokens of the context alone. Where there is no context, a start token
takes its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.scoring import Passage

if TYPE_CHECKING:
    from collections.abc import Sequence


class TextCodec(Protocol):
    """What the rules need of a tokenizer."""

    @property
    def start_id(self) -> int | None:
        """Id of the token that may stand before a text."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


def continuation_passage(
    codec: TextCodec, context: str, continuation: str, *, context_length: int
) -> Passage:
    """All tokens of `continuation` scored after `context`, cut on the left to `context_length` and one more.

    Spaces at the end of the context count as the continuation's. Raises `DataError` without a start token where
    one is needed.
    """
    before = codec.encode(context.rstrip())
    scored = codec.encode(context + continuation)[len(before) :]
    ids = tuple([*(before or [_start(codec)]), *scored][-(context_length + 1) :])
    return Passage(ids, max(0, min(len(scored), len(ids) - 1)))


def document_passages(codec: TextCodec, text: str, *, context_length: int) -> list[Passage]:
    """Windows that together score every token of a text once, the first after the start token.

    The last window reaches back as far as `context_length` allows. Raises `DataError` without a start token.
    """
    ids = [_start(codec), *codec.encode(text)]
    passages = []
    for first in range(1, len(ids), context_length):
        end = min(first + context_length, len(ids))
        passages.append(Passage(tuple(ids[max(0, end - context_length - 1) : end]), end - first))
    return passages


def _start(codec: TextCodec) -> int:
    if codec.start_id is None:
        raise DataError(
            "the harness protocol sets a start token before a text without context, and this tokenizer has "
            "neither <s> nor </s>"
        )
    return codec.start_id
