"""Choosing the next token from logits: what is left to choose from, and the draw.

The filters work on any device; the draw of this file is made on the CPU in float32, so that a seed means the same
everywhere, and by a generator of each sequence, so that it does not matter which others are written beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeut_compose.data.errors import DataError

_COLD = 1e-4
"""Below this temperature a quotient of float32 may overflow; less the largest logit it may only underflow."""


class NotFinite(DataError):
    """There is nothing to choose from."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The settings apply in the order in which they stand here.

    Raises `ValueError` for settings out of range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided by it, or multiplied where they are negative (arXiv:1909.05858)."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among so many tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens of this joint probability (arXiv:1904.09751)."""
    min_p: float | None = None
    """Choose among tokens at least so likely as this share of the likeliest one (arXiv:2407.01082)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is below 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and at most at 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be finite and above 0")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """What is drawn from: `logits [B, V]` in float32 after all settings, minus infinity where nothing may be drawn.

    `seen [B, V]` are booleans of the tokens that the repetition penalty applies to. Greedy sampling leaves the
    likeliest token alone.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        changed = torch.where(logits > 0, logits / penalty, logits * penalty).nan_to_num()
        logits = torch.where(seen & logits.isfinite(), changed, logits)
    if sampling.is_greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    if sampling.temperature < _COLD:
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        surplus = ordered.cumsum(-1) - ordered >= sampling.top_p
        surplus[..., 0] = False  # a share below what float32 can tell from zero still leaves the likeliest
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), float("-inf"))
    if sampling.min_p is not None:
        probability = logits.softmax(-1)
        lowest = sampling.min_p * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(probability < lowest, float("-inf"))
    return logits


def sample(
    logits: Tensor, sampling: Sampling, generators: list[torch.Generator], seen: Tensor | None = None
) -> list[int]:
    """Draw one token for each row of `logits [B, V]`, on the CPU, each row by a generator of its own.

    Raises `NotFinite`.
    """
    logits = logits.cpu()
    if logits.isnan().any() or not logits.isfinite().any(-1).all():
        raise NotFinite("the model's logits are not numbers: there is no next token")
    left = filtered(logits, sampling, None if seen is None else seen.cpu())
    if sampling.is_greedy:
        return [int(best) for best in left.argmax(-1)]
    probabilities = left.softmax(-1)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def seen_tokens(prompts: list[list[int]], vocab_size: int) -> Tensor:
    """Booleans `[B, V]`: which tokens each prompt holds."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen
