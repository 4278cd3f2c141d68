"""Whether a router chooses the same experts again: in other repeats, for the same token elsewhere, for any token.

The similarity of two sets is the size of their intersection over that of their union. Pairs of tokens are
taken within a window, so that no figure depends on the size of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeut_compose.analyze.calls import RouterCalls


@dataclass(frozen=True)
class Overlap:
    """Means over tokens and heads; NaN where there was nothing to compare."""

    between: np.ndarray
    """`[R, R]` similarity of a token's sets in two repeats."""
    unrelated: np.ndarray
    """`[R, R]` the same for two tokens half a window apart: what usage alone explains."""
    same_token: np.ndarray
    """`[R]` similarity of the sets of a token and of its last occurrence in the window."""
    fresh: np.ndarray
    """`[R - 1]` share of tokens that use none of a repeat's experts again in the next."""
    path_diversity: float
    """Experts that a token meets in all its repeats over those in one; 1 to R."""


class OverlapSums:
    """Sums over the batches so far."""

    def __init__(self, n_repeats: int, n_heads: int, n_experts: int, device: torch.device) -> None:
        def mean(*shape: int) -> _Mean:
            return _Mean(torch.zeros(2, *shape, dtype=torch.float64, device=device))

        self._between = mean(n_repeats, n_repeats)
        self._unrelated = mean(n_repeats, n_repeats)
        self._same_token = mean(n_repeats)
        self._fresh = mean(max(0, n_repeats - 1))
        self._paths = mean()

    def add(self, calls: RouterCalls) -> None:
        sets = calls.chosen.permute(1, 2, 3, 0, 4).float()  # [B, T, H, R, E]
        self._between.add(*_similarity(sets, sets))
        self._unrelated.add(*_similarity(sets, sets.roll(sets.shape[1] // 2, dims=1)))
        self._add_same_token(calls)
        shared = (sets[..., :-1, :] * sets[..., 1:, :]).sum(-1)
        both = sets[..., :-1, :].any(-1) & sets[..., 1:, :].any(-1)
        self._fresh.add((shared == 0).double(), both)
        sizes = sets.sum(-1)
        used = sizes > 0
        mean_size = sizes.sum(-1) / used.sum(-1).clamp_min(1)
        union = sets.amax(-2).sum(-1)
        self._paths.add((union / mean_size.clamp_min(1e-9)).double(), used.any(-1))

    def _add_same_token(self, calls: RouterCalls) -> None:
        order = calls.ids.argsort(dim=1, stable=True)
        ids = calls.ids.gather(1, order)
        window, place = (ids[:, 1:] == ids[:, :-1]).nonzero(as_tuple=True)
        later, earlier = order[window, place + 1], order[window, place]
        left, right = calls.chosen[:, window, later], calls.chosen[:, window, earlier]  # [R, P, H, E]
        union = (left | right).sum(-1)
        valid = left.any(-1) & right.any(-1)
        similarity = (left & right).sum(-1) / union.clamp_min(1)
        self._same_token.add(similarity.double().permute(1, 2, 0), valid.permute(1, 2, 0))

    def result(self) -> Overlap:
        return Overlap(
            between=self._between.value(),
            unrelated=self._unrelated.value(),
            same_token=self._same_token.value(),
            fresh=self._fresh.value(),
            path_diversity=float(self._paths.value()),
        )


def _similarity(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of all pairs of repeats `[B, T, H, R, R]`, and where both sets hold anything."""
    shared = left @ right.transpose(-1, -2)
    size_left, size_right = left.sum(-1)[..., :, None], right.sum(-1)[..., None, :]
    union = size_left + size_right - shared
    return (shared / union.clamp_min(1)).double(), (size_left > 0) & (size_right > 0)


class _Mean:
    """Sum and count of what is valid, over all but the last dimensions."""

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums

    def add(self, values: Tensor, valid: Tensor) -> None:
        leading = tuple(range(values.dim() - (self._sums.dim() - 1)))
        self._sums[0] += (values * valid).sum(leading)
        self._sums[1] += valid.sum(leading)

    def value(self) -> np.ndarray:
        total, count = self._sums.cpu().numpy()
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_of(values: np.ndarray) -> float:
    """The mean of what exists; NaN if nothing does."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
