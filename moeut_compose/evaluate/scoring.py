"""Log-probabilities of given tokens: passages batched by length, in float32, each distinct one computed once.

Inputs are padded on the right with id 0, which a causal model cannot see from the left. Because equal
passages share one result, equal options tie exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

PADDING = 0


@dataclass(frozen=True)
class Passage:
    """Tokens of which the last `n_scored` are scored, each given all before it."""

    ids: tuple[int, ...]
    n_scored: int

    def __post_init__(self) -> None:
        if not 0 <= self.n_scored <= max(0, len(self.ids) - 1):
            raise ValueError(
                f"n_scored={self.n_scored} does not fit {len(self.ids)} tokens: the first has no prediction"
            )

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.ids[len(self.ids) - self.n_scored :]


@dataclass(frozen=True)
class Score:
    """What a model says of the scored tokens of a passage."""

    log_probabilities: tuple[float, ...]
    """Of each scored token, in nats."""
    predictions: tuple[int, ...]
    """The likeliest token at each of their places."""

    @property
    def log_likelihood(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(self.log_probabilities)

    @property
    def normalized(self) -> float:
        """Log-likelihood per token; not a number, and so never the best, without tokens."""
        n_tokens = len(self.log_probabilities)
        return self.log_likelihood / n_tokens if n_tokens else math.nan


def score_passages(
    model: nn.Module,
    passages: Sequence[Passage],
    *,
    max_tokens: int = 8192,
    between: Callable[[int], None] = lambda n: None,
) -> list[Score]:
    """Score passages with a language model.

    `max_tokens` bounds the tokens of a batch, padding included; a longer passage is a batch of its own.
    `between` is called after each batch with the number of passages that it settled.
    """
    device = next(model.parameters()).device
    known: dict[Passage, Score] = {}
    how_often = Counter(passages)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for batch in batches_by_length(list(how_often), max_tokens):
                known.update(zip(batch, _score_batch(model, batch, device), strict=True))
                between(sum(how_often[passage] for passage in batch))
    finally:
        model.train(was_training)
    return [known[passage] for passage in passages]


def batches_by_length(passages: Sequence[Passage], max_tokens: int) -> Iterator[list[Passage]]:
    """Passages of like length together, the longest first, so that memory runs out early or never."""
    batch: list[Passage] = []
    for passage in sorted(passages, key=lambda passage: len(passage.ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def _score_batch(model: nn.Module, batch: Sequence[Passage], device: torch.device) -> list[Score]:
    longest = max(len(passage.ids) for passage in batch)
    if longest < 2:
        return [Score((), ()) for _ in batch]
    rows = [[*passage.ids, *[PADDING] * (longest - len(passage.ids))] for passage in batch]
    ids = torch.tensor(rows, device=device)
    logits = model(ids[:, :-1]).logits.float()
    predictions = logits.argmax(-1).tolist()
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
    log_probabilities = (chosen - logits.logsumexp(-1)).tolist()
    scores = []
    for row, passage in enumerate(batch):
        end = max(0, len(passage.ids) - 1)
        place = slice(end - passage.n_scored, end)
        scores.append(Score(tuple(log_probabilities[row][place]), tuple(predictions[row][place])))
    return scores
