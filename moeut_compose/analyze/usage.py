"""How evenly a router uses its experts, and how sharply it chooses, in each repeat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeut_compose.analyze.calls import RouterCalls
from moeut_compose.train.router_load import DEAD_BELOW


@dataclass(frozen=True)
class Usage:
    """Figures by repeat; where a router chooses for each head on its own, means over heads unless said otherwise.

    Without tokens, shares and weights are zero and all other figures NaN.
    """

    tokens: np.ndarray
    """`[R]` tokens that were routed."""
    share: np.ndarray
    """`[R, H, E]` share of the tokens that use an expert; adds up to the number of chosen experts."""
    weight: np.ndarray
    """`[R, H, E]` mean weight of an expert over all tokens."""
    entropy: np.ndarray
    """`[R]` mean over tokens of the entropy of the softmax over all scores, in nats."""
    usage_entropy: np.ndarray
    """`[R]` entropy of the distribution of uses over experts, in nats; ln E if even."""
    top1_over_median: np.ndarray
    """`[R]` largest over median softmax probability, geometric mean over tokens."""
    max_over_mean: np.ndarray
    """`[R]` uses of the most used expert over an even share, in the head where that is largest."""
    dead: np.ndarray
    """`[R]` experts with less than 1 % of an even share, summed over heads."""

    @property
    def load(self) -> np.ndarray:
        """`[R, H, E]` uses in relation to an even share."""
        return relative_load(self.share)


class UsageSums:
    """Sums over the batches so far."""

    def __init__(self, n_repeats: int, n_heads: int, n_experts: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._tokens = zeros(n_repeats)
        self._uses = zeros(n_repeats, n_heads, n_experts)
        self._weights = zeros(n_repeats, n_heads, n_experts)
        self._entropy = zeros(n_repeats)
        self._log_ratio = zeros(n_repeats)

    def add(self, calls: RouterCalls) -> None:
        runs = calls.runs.double()
        self._tokens += runs.sum((1, 2))
        self._uses += calls.chosen.sum((1, 2))
        self._weights += (calls.gate * calls.chosen).sum((1, 2), dtype=torch.float64)
        entropy = torch.special.entr(calls.logits.softmax(-1)).sum(-1).mean(-1)
        self._entropy += (entropy * runs).sum((1, 2))
        ratio = (calls.logits.amax(-1) - _log_median(calls.logits)).mean(-1)
        self._log_ratio += (ratio * runs).sum((1, 2))

    def result(self) -> Usage:
        tokens = self._tokens.cpu().numpy()
        routed = np.maximum(tokens, 1)
        share = self._uses.cpu().numpy() / routed[:, None, None]
        load = relative_load(share)
        distribution = load / load.shape[-1]
        known = np.where(tokens > 0, 1.0, np.nan)  # no token may have come to a pass
        logs = np.log(np.where(distribution > 0, distribution, 1))
        return Usage(
            tokens=tokens,
            share=share,
            weight=self._weights.cpu().numpy() / routed[:, None, None],
            entropy=known * self._entropy.cpu().numpy() / routed,
            usage_entropy=-known * (distribution * logs).sum(-1).mean(-1),
            top1_over_median=known * np.exp(self._log_ratio.cpu().numpy() / routed),
            max_over_mean=known * load.max((-1, -2)),
            dead=known * (load < DEAD_BELOW).sum((-1, -2)),
        )


def relative_load(share: np.ndarray) -> np.ndarray:
    """Uses `[..., E]` in relation to an even share."""
    total = share.sum(-1, keepdims=True)
    return share * share.shape[-1] / np.where(total > 0, total, 1)


def _log_median(logits: Tensor) -> Tensor:
    """Logarithm of the median of exp(logits) over the last dimension; of two middle ones, of their mean."""
    ordered, n = logits.sort(-1).values, logits.shape[-1]
    return torch.logaddexp(ordered[..., (n - 1) // 2], ordered[..., n // 2]) - math.log(2)
