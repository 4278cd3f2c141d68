"""How deep tokens go through a stage that halts them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeut_compose.analyze.observe import Application

N_BINS = 20
"""Bins of the expected number of passes."""
N_WINDOWS = 8
"""Windows whose depths are kept token by token."""
MIN_OCCURRENCES = 5
"""Occurrences below which the mean depth of a token says little."""


@dataclass(frozen=True)
class TokenDepth:
    """Mean depth of one token of the vocabulary."""

    id: int
    occurrences: int
    expected: float


@dataclass(frozen=True)
class Depths:
    """Tokens of a stage with R passes. The expected number of passes weighs each with the mass that went into it."""

    tokens: int
    passes: np.ndarray
    """`[R]` tokens that ran in 1, 2, ... R passes."""
    mass: np.ndarray
    """`[R]` mean mass that goes into each pass; its sum is the mean expected number of passes."""
    expected: np.ndarray
    """`[N_BINS]` tokens by expected number of passes, in equal bins from 1 to R."""
    loss: np.ndarray
    """`[R]` mean loss in nats at tokens that ran in 1, 2, ... R passes; NaN where there are none."""
    loss_expected: np.ndarray
    """`[N_BINS]` mean loss in nats in the bins of `expected`."""
    deep: tuple[TokenDepth, ...]
    """Vocabulary with the largest mean expected depth."""
    shallow: tuple[TokenDepth, ...]
    windows: np.ndarray
    """`[n, T]` expected number of passes of each token of the first windows."""
    ids: np.ndarray
    """`[n, T]` the tokens of these windows."""

    @property
    def mean(self) -> float:
        """Mean expected number of passes."""
        return float(self.mass.sum())


class HaltingSums:
    """Sums over the batches so far."""

    def __init__(self, n_repeats: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._n_repeats = n_repeats
        self._mass = zeros(n_repeats)
        self._passes = zeros(2, n_repeats)  # tokens, and their loss
        self._bins = zeros(2, N_BINS)
        self._words = zeros(2, vocab_size)  # occurrences, and their expected depth
        self._windows: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def add(self, applications: Sequence[Application], ids: Tensor, losses: Tensor) -> None:
        """Count a batch: the applications of the stage, its tokens and the loss at each, both `[B, T]`."""
        first = {one.repeat: one.mass for one in reversed(applications)}
        mass = torch.stack([first[repeat] for repeat in range(self._n_repeats)]).double()
        passes = (mass > 0).sum(0)
        expected = mass.sum(0)
        self._mass += mass.sum((1, 2))
        _count(self._passes, passes - 1, losses)
        width = max(self._n_repeats - 1, 1) / N_BINS
        bins = ((expected - 1) / width).long().clamp(0, N_BINS - 1)
        _count(self._bins, bins, losses)
        _count(self._words, ids, expected)
        for row, tokens in zip(expected, ids, strict=True):
            if len(self._windows) < N_WINDOWS:
                self._windows.append(row.cpu().numpy())
                self._ids.append(tokens.cpu().numpy())

    def result(self, n_words: int = 12) -> Depths:
        passes, losses = self._passes.cpu().numpy()
        binned, binned_losses = self._bins.cpu().numpy()
        tokens = int(passes.sum())
        words = self._word_depths()
        return Depths(
            tokens=tokens,
            passes=passes,
            mass=self._mass.cpu().numpy() / max(tokens, 1),
            expected=binned,
            loss=_ratio(losses, passes),
            loss_expected=_ratio(binned_losses, binned),
            deep=tuple(words[:n_words]),
            shallow=tuple(reversed(words[max(n_words, len(words) - n_words) :])),
            windows=np.stack(self._windows),
            ids=np.stack(self._ids),
        )

    def _word_depths(self) -> list[TokenDepth]:
        """Of the vocabulary that occurred often enough, the deepest first."""
        occurrences, depth = self._words.cpu().numpy()
        known = np.flatnonzero(occurrences >= MIN_OCCURRENCES)
        words = [TokenDepth(int(i), int(occurrences[i]), float(depth[i] / occurrences[i])) for i in known]
        return sorted(words, key=lambda word: (-word.expected, word.id))


def _count(sums: Tensor, places: Tensor, values: Tensor) -> None:
    """Add one, and a value, at each place."""
    flat = places.flatten()
    sums[0] += torch.bincount(flat, minlength=sums.shape[1])
    sums[1].index_add_(0, flat, values.flatten().double())


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
