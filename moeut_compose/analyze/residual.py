"""What each application does to the residual stream, and how alike the states after different applications are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moeut_compose.analyze.observe import Application

FIELDS = ("rms_before", "rms_after", "update", "mixer", "feedforward", "cosine")


@dataclass(frozen=True)
class Residual:
    """Means over the tokens that run, by application `[A]`; NaN where none does."""

    tokens: np.ndarray
    rms_before: np.ndarray
    """Root mean square over channels of the residual stream before the layer."""
    rms_after: np.ndarray
    update: np.ndarray
    """Norm of what the layer changed over the norm before."""
    mixer: np.ndarray
    """Norm of the mixer's output over the norm before."""
    feedforward: np.ndarray
    """Norm of the feedforward's output over the norm before."""
    cosine: np.ndarray
    """Between the stream before and after."""


@dataclass(frozen=True)
class Similarity:
    """Mean cosines `[A, A]` over tokens that run in both applications; NaN where there are none."""

    states: np.ndarray
    """Of the residual stream after two applications."""
    updates: np.ndarray
    """Of what two applications changed."""


class ResidualSums:
    """Sums over the batches so far, by application in running order."""

    def __init__(self, n_applications: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._tokens = zeros(n_applications)
        self._sums = zeros(n_applications, len(FIELDS))
        self._states = zeros(n_applications, n_applications)
        self._updates = zeros(n_applications, n_applications)
        self._pairs = zeros(n_applications, n_applications)

    def add(self, applications: Sequence[Application]) -> None:
        for index, one in enumerate(applications):
            runs = one.runs.double()
            self._tokens[index] += runs.sum()
            figures = torch.stack(_figures(one), dim=-1).double()
            self._sums[index] += (figures * runs[..., None]).sum((0, 1))
        runs = torch.stack([one.runs for one in applications]).flatten(1).double()
        self._pairs += runs @ runs.T
        self._states += _cosines([one.after for one in applications], runs)
        self._updates += _cosines([one.after - one.before for one in applications], runs)

    def result(self) -> tuple[Residual, Similarity]:
        tokens = self._tokens.cpu().numpy()
        means = self._sums.cpu().numpy() / np.where(tokens > 0, tokens, np.nan)[:, None]
        pairs = self._pairs.cpu().numpy()

        def mean(total: Tensor) -> np.ndarray:
            return np.where(pairs > 0, total.cpu().numpy() / np.maximum(pairs, 1), np.nan)

        fields = dict(zip(FIELDS, means.T, strict=True))
        return Residual(tokens, **fields), Similarity(mean(self._states), mean(self._updates))


def _figures(one: Application) -> list[Tensor]:
    """In the order of `FIELDS`, each `[B, T]`."""
    before = one.before.norm(dim=-1)
    scale = one.before.shape[-1] ** 0.5
    safe = before.clamp_min(torch.finfo(before.dtype).tiny)
    return [
        before / scale,
        one.after.norm(dim=-1) / scale,
        (one.after - one.before).norm(dim=-1) / safe,
        one.mixed.norm(dim=-1) / safe,
        one.transformed.norm(dim=-1) / safe,
        F.cosine_similarity(one.before, one.after, dim=-1),
    ]


def _cosines(vectors: Sequence[Tensor], runs: Tensor) -> Tensor:
    """Summed cosines `[A, A]` of vectors `[B, T, D]` over tokens that run in both."""
    units = torch.stack([F.normalize(part.flatten(0, 1), dim=-1) for part in vectors])
    units = units * runs[..., None].to(units)
    return torch.einsum("and,bnd->ab", units, units).double()
