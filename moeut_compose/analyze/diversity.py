"""Which tokens an expert works for, and where in the text it weighs most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moeut_compose.analyze.calls import RouterCalls

N_TOKENS = 10
"""Characteristic tokens kept for each expert."""
N_CONTEXTS = 4
"""Places kept for each expert."""


@dataclass(frozen=True)
class TypicalToken:
    """A token that an expert sees more often than the text does."""

    id: int
    share: float
    """Of the uses of the expert."""
    lift: float
    """That share over the token's share of all uses of the router."""


@dataclass(frozen=True)
class Place:
    """A use of an expert."""

    position: int
    """In the text, in tokens."""
    repeat: int
    gate: float


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert over all repeats."""

    head: int
    expert: int
    uses: int
    distinct: int
    """Different tokens."""
    effective: float
    """exp(entropy of the tokens): as many equally frequent tokens would be as diverse. 0 for an expert without uses."""
    specialisation: float
    """Kullback-Leibler divergence of its tokens from those of the router, in nats; 0 if it works for all alike."""
    typical: tuple[TypicalToken, ...]
    """By their part in the divergence."""
    places: tuple[Place, ...]
    """The largest weights, one for each place in the text."""


@dataclass(frozen=True)
class Diversity:
    """All experts of a router, and the text as the router saw it."""

    experts: tuple[ExpertTokens, ...]
    effective: float
    """Effective number of tokens over all uses: what an expert without preference would have."""


class DiversitySums:
    """Counts `[V, H * E]` and the best places over the batches so far."""

    def __init__(self, n_heads: int, n_experts: int, vocab_size: int, device: torch.device) -> None:
        units = n_heads * n_experts
        self._n_experts = n_experts
        self._counts = torch.zeros(vocab_size, units, dtype=torch.int32, device=device)
        self._gate = torch.zeros(0, units, device=device)
        self._position = torch.zeros(0, units, dtype=torch.long, device=device)
        self._repeat = torch.zeros(0, units, dtype=torch.long, device=device)

    def add(self, calls: RouterCalls) -> None:
        ids = calls.ids.flatten()
        gates = (calls.gate * calls.chosen).flatten(1, 2).flatten(2)  # [R, N, H * E]
        for used in calls.chosen.flatten(1, 2).flatten(2):
            self._counts.index_add_(0, ids, used.int())
        best, repeat = gates.max(0)
        best, rows = best.topk(min(N_CONTEXTS, best.shape[0]), dim=0)
        gate = torch.cat((self._gate, best.float()))
        position = torch.cat((self._position, calls.positions.flatten()[rows]))
        repeats = torch.cat((self._repeat, repeat.gather(0, rows)))
        self._gate, rows = gate.topk(min(N_CONTEXTS, gate.shape[0]), dim=0)
        self._position, self._repeat = position.gather(0, rows), repeats.gather(0, rows)

    def result(self) -> Diversity:
        counts = self._counts.cpu().numpy()
        gates, positions, repeats = (
            part.cpu().numpy() for part in (self._gate, self._position, self._repeat)
        )
        overall = counts.sum(1, dtype=np.float64)
        overall /= max(overall.sum(), 1)
        experts = []
        for unit in range(counts.shape[1]):
            places = tuple(
                Place(int(position), int(repeat), float(gate))
                for gate, position, repeat in zip(
                    gates[:, unit], positions[:, unit], repeats[:, unit], strict=True
                )
                if gate > 0
            )
            head, expert = divmod(unit, self._n_experts)
            experts.append(_describe(head, expert, counts[:, unit], overall, places))
        return Diversity(tuple(experts), effective_number(overall))


def _describe(
    head: int, expert: int, counts: np.ndarray, overall: np.ndarray, places: tuple[Place, ...]
) -> ExpertTokens:
    uses = int(counts.sum())
    seen = counts.nonzero()[0]
    share = counts[seen] / max(uses, 1)
    part = share * np.log(share / overall[seen])
    best = np.argsort(-part, kind="stable")[:N_TOKENS]
    typical = tuple(
        TypicalToken(int(seen[i]), float(share[i]), float(share[i] / overall[seen[i]]))
        for i in best
        if part[i] > 0
    )
    return ExpertTokens(
        head, expert, uses, len(seen), effective_number(share), float(part.sum()), typical, places
    )


def effective_number(share: np.ndarray) -> float:
    """exp of the entropy of a distribution; 0 of an empty one."""
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0
