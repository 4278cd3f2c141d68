"""The rules of zero-shot evaluation: which tokens are scored, and which score is right.

`Published` follows the evaluation of the MoEUT paper (arXiv:2405.16039) as it was run, `Harness` that of
lm-evaluation-harness. docs/evaluation.md sets them side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from moeut_compose.evaluate.passages import continuation_passage
from moeut_compose.evaluate.scoring import Passage
from moeut_compose.evaluate.tasks.items import LastWord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.evaluate.passages import TextCodec
    from moeut_compose.evaluate.scoring import Score
    from moeut_compose.evaluate.tasks.items import Item

ProtocolName = Literal["published", "harness"]


@dataclass(frozen=True)
class Verdict:
    """What one item contributes to the result of its benchmark."""

    is_correct: bool
    others: dict[str, float] = field(default_factory=dict)
    """Further figures, to be averaged over items."""


class Rules(Protocol):
    """One protocol for one tokenizer."""

    def passages(self, item: Item) -> list[Passage]:
        """What the model has to read for an item."""

    def judge(self, item: Item, passages: Sequence[Passage], scores: Sequence[Score]) -> Verdict:
        """What the scores of these passages mean."""


@dataclass(frozen=True)
class Published:
    """Context and options tokenised apart, scores per token, ties lost."""

    codec: TextCodec

    def passages(self, item: Item) -> list[Passage]:
        if isinstance(item, LastWord):
            ids = self.codec.encode(item.text)
            wanted = max(len(item.word), len(self.codec.encode(item.word)))
            return [Passage(tuple(ids), max(0, min(wanted, len(ids) - 1)))]
        options = [self.codec.encode(option) for option in item.options]
        if not item.context:
            return [Passage(tuple(ids), max(0, len(ids) - 1)) for ids in options]
        context = self.codec.encode(item.context)
        return [Passage((*context, *ids), len(ids)) for ids in options]

    def judge(self, item: Item, passages: Sequence[Passage], scores: Sequence[Score]) -> Verdict:
        if isinstance(item, LastWord):
            return self._judge_word(item, passages[0], scores[0])
        if not item.context:
            return Verdict(is_strictly_best([score.log_likelihood for score in scores], item.answer))
        return Verdict(is_strictly_best([score.normalized for score in scores], item.answer))

    def _judge_word(self, item: LastWord, passage: Passage, score: Score) -> Verdict:
        """The predictions at as many last places as the word has characters must spell the word last."""
        predictions = score.predictions[-len(item.word) :]
        said = self.codec.decode(predictions).split(" ")[-1]
        n_tokens = len(self.codec.encode(item.word))
        of_word = score.log_probabilities[-n_tokens:]
        return Verdict(
            is_correct=said == item.word,
            others={
                "last_token_accuracy": float(
                    bool(passage.targets) and score.predictions[-1:] == passage.targets[-1:]
                ),
                "target_nats": -math.fsum(of_word) / max(1, len(of_word)),
            },
        )


@dataclass(frozen=True)
class Harness:
    """Context and option tokenised together, scores per character, ties to the first."""

    codec: TextCodec
    context_length: int
    """Tokens before these are cut off on the left."""

    def passages(self, item: Item) -> list[Passage]:
        options = [item.word] if isinstance(item, LastWord) else item.options
        return [
            continuation_passage(self.codec, item.context, f" {option}", context_length=self.context_length)
            for option in options
        ]

    def judge(self, item: Item, passages: Sequence[Passage], scores: Sequence[Score]) -> Verdict:
        # nothing to score is no certainty: an option without tokens is not the likeliest
        log_likelihoods = [
            score.log_likelihood if passage.targets else -math.inf
            for passage, score in zip(passages, scores, strict=True)
        ]
        if isinstance(item, LastWord):
            is_greedy = bool(passages[0].targets) and scores[0].predictions == passages[0].targets
            return Verdict(is_greedy, {"target_nats": -scores[0].log_likelihood})
        is_best = is_first_best(log_likelihoods, item.answer)
        if not item.context:
            return Verdict(is_best)
        pairs = zip(log_likelihoods, item.options, strict=True)
        by_character = [value / len(option) if option else -math.inf for value, option in pairs]
        return Verdict(is_first_best(by_character, item.answer), {"unnormalized_accuracy": float(is_best)})


def rules(protocol: ProtocolName, codec: TextCodec, *, context_length: int) -> Rules:
    """The rules of a protocol."""
    return Published(codec) if protocol == "published" else Harness(codec, context_length)


def is_strictly_best(values: Sequence[float], answer: int) -> bool:
    """Whether the value at `answer` is greater than every other."""
    return all(values[answer] > value for index, value in enumerate(values) if index != answer)


def is_first_best(values: Sequence[float], answer: int) -> bool:
    """Whether the greatest value is at `answer`, and at no earlier place."""
    return max(range(len(values)), key=values.__getitem__) == answer
