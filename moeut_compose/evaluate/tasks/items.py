"""What a benchmark asks, free of any protocol: to choose among texts, or to name the last word."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One right text among several."""

    context: str
    """What precedes every option; empty where whole sentences are compared."""
    options: tuple[str, ...]
    answer: int
    """Index of the right option."""
    group: str = ""
    """Part of the benchmark whose accuracy counts on its own, such as a paradigm."""


@dataclass(frozen=True)
class LastWord:
    """A passage whose last word is to be predicted."""

    text: str
    group: str = ""

    @property
    def context(self) -> str:
        """All but the last word, without the space before it."""
        return self.text.rpartition(" ")[0]

    @property
    def word(self) -> str:
        """What follows the last space."""
        return self.text.rpartition(" ")[2]


Item = Choice | LastWord
