"""Which experts of a router are chosen together for one token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moeut_compose.analyze.calls import RouterCalls

N_PAIRS = 20
"""Pairs named for each router."""


@dataclass(frozen=True)
class Pair:
    """Two experts of one head."""

    head: int
    experts: tuple[int, int]
    count: int
    lift: float
    """Count over what independent choices with the same usage in each repeat would give."""


@dataclass(frozen=True)
class CoOccurrence:
    """Pairs over all repeats."""

    counts: np.ndarray
    """`[H, E, E]`; uses on the diagonal."""
    expected: np.ndarray
    """`[H, E, E]` for independent choices."""

    @property
    def lift(self) -> np.ndarray:
        """`[H, E, E]` counts over expected, one added to both so that rare pairs stay near 1.

        NaN on the diagonal and for experts that were never used.
        """
        lift = np.where(self.expected > 0, (self.counts + 1) / (self.expected + 1), np.nan)
        diagonal = np.arange(lift.shape[-1])
        lift[:, diagonal, diagonal] = np.nan
        return lift

    def closest(self, n: int = N_PAIRS) -> list[Pair]:
        """The pairs that exceed what is expected most, by the surplus in standard deviations of a count."""
        expected = np.triu(self.expected, 1)
        surplus = np.divide(
            np.triu(self.counts, 1) - expected,
            np.sqrt(expected),
            out=np.zeros_like(expected),
            where=expected > 0,
        )
        best = np.argsort(-surplus, axis=None, kind="stable")[:n]
        pairs = []
        for head, first, second in zip(*np.unravel_index(best, surplus.shape), strict=True):
            if surplus[head, first, second] > 0:
                count = self.counts[head, first, second]
                lift = count / self.expected[head, first, second]
                pairs.append(Pair(int(head), (int(first), int(second)), int(count), float(lift)))
        return pairs

    def order(self) -> np.ndarray:
        """Experts of the first head, so that those chosen together are neighbours: along the Fiedler vector."""
        affinity = np.nan_to_num(self.lift[0])
        degree = np.sqrt(np.maximum(affinity.sum(0), 1e-12))
        _, vectors = np.linalg.eigh(affinity / degree[:, None] / degree[None, :])
        return np.argsort(vectors[:, -2] / degree, kind="stable")


class PairSums:
    """Counts over the batches so far."""

    def __init__(self, n_repeats: int, n_heads: int, n_experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(n_heads, n_experts, n_experts, dtype=torch.float64, device=device)
        self._uses = torch.zeros(n_repeats, n_heads, n_experts, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(n_repeats, dtype=torch.float64, device=device)

    def add(self, calls: RouterCalls) -> None:
        for chosen in calls.chosen:
            sets = chosen.flatten(0, 1).transpose(0, 1).float()  # [H, N, E]
            self._counts += sets.transpose(1, 2) @ sets
        self._uses += calls.chosen.sum((1, 2))
        self._tokens += calls.runs.sum((1, 2))

    def result(self) -> CoOccurrence:
        uses = self._uses / self._tokens.clamp_min(1)[:, None, None]
        expected = torch.einsum("rhe,rhf,r->hef", uses, uses, self._tokens)
        return CoOccurrence(self._counts.cpu().numpy(), expected.cpu().numpy())
