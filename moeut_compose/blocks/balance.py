"""Balance terms: sums that a router observes, and the loss that follows from the pooled sums.

All sums keep the batch dimension, `[B, H, ...]`, so that a term may be taken per sequence or over the
micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from moeut_compose.blocks.stats import Stats


class Observation(NamedTuple):
    """One call of a router, as its balance terms see it."""

    logits: Tensor
    """`[B, T, H, E]`, at least float32."""
    index: Tensor  # type: ignore[assignment]  # a field, not the method of tuples
    """`[B, T, H, K]` chosen experts."""
    gate: Tensor
    """`[B, T, H, K]` their weights."""
    alive: Tensor | None
    """`[B, T]` mass that has not halted, zero for tokens that rest; None means one everywhere."""
    known_usage: Tensor | None = None
    """What `usage` returns, where the router has it already."""

    def probability(self) -> Tensor:
        """`[B, T, H, E]` softmax of the logits; zero for tokens that rest."""
        probability = self.logits.softmax(-1)
        if self.alive is None:
            return probability
        return probability.masked_fill((self.alive == 0)[:, :, None, None], 0.0)

    def usage(self) -> Tensor:
        """`[B, H, E]` probability of each expert, times mass, summed over the tokens."""
        if self.known_usage is not None:
            return self.known_usage
        return (self.probability() * self.mass()).sum(1)

    def mass(self) -> Tensor:
        """`[B, T, 1, 1]` weight of each token."""
        if self.alive is None:
            return self.logits.new_ones(*self.logits.shape[:2], 1, 1)
        return self.alive[:, :, None, None].to(self.logits.dtype)

    def per_expert(self, values: Tensor) -> Tensor:
        """Sum `[B, T, H, K]` values by chosen expert: `[B, H, E]`."""
        batch, _, heads, n_experts = self.logits.shape
        zeros = values.new_zeros(batch, heads, n_experts)
        places = self.index.transpose(1, 2).reshape(batch, heads, -1).long()
        return zeros.scatter_add(-1, places, values.transpose(1, 2).reshape(batch, heads, -1))

    def load(self) -> Tensor:
        """How many tokens use each expert, `[B, H, E]`; no gradient."""
        return self.per_expert((self.gate > 0).to(self.logits.dtype)).detach()


@dataclass(frozen=True)
class Balance(ABC):
    """A balance term: `weight` times `loss` of the pooled sums that `observe` returned."""

    name: ClassVar[str]
    weight: float
    scope: Literal["sequence", "micro_batch"]

    @abstractmethod
    def observe(self, seen: Observation) -> Stats:
        """Sums of one call, each `[B, ...]`."""

    @abstractmethod
    def loss(self, stats: Stats) -> Tensor:
        """The unweighted term, a scalar."""

    def pooled(self, stats: Stats) -> Stats:
        """The sums over the scope: as they are for a sequence, summed over the batch for a micro-batch."""
        if self.scope == "sequence":
            return stats
        return {name: value.sum(0, keepdim=True) for name, value in stats.items()}


class Entropy(Balance):
    """Minus the entropy of mean expert usage, averaged over sequences and heads (arXiv:2405.16039)."""

    name = "entropy"

    def observe(self, seen: Observation) -> Stats:
        return {"probability": seen.usage(), "mass": seen.mass().sum(1)}

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        usage = sums["probability"] / sums["mass"]
        entropy: Tensor = torch.special.entr(usage).sum(-1)
        return -entropy.mean()


class Switch(Balance):
    """E x sum of load x mean probability (arXiv:2101.03961, equation 4); the load carries no gradient."""

    name = "switch"

    def observe(self, seen: Observation) -> Stats:
        return {"probability": seen.usage(), "count": seen.load()}

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        share = sums["probability"] / sums["probability"].sum(-1, keepdim=True)
        load = sums["count"] / sums["count"].sum(-1, keepdim=True).clamp_min(1)
        return (load * share).sum(-1).mean() * share.shape[-1]


class ZLoss(Balance):
    """Mean squared log-sum-exp of the logits (arXiv:2202.08906, equation 5)."""

    name = "z_loss"

    def observe(self, seen: Observation) -> Stats:
        mass = seen.mass()
        squares = torch.logsumexp(seen.logits, -1, keepdim=True).square()
        return {"square": (squares * mass).sum(1), "mass": mass.sum(1)}

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        return (sums["square"] / sums["mass"]).mean()


class CVSquared(Balance):
    """Variance over squared mean of the summed gates (arXiv:1701.06538, equation 7)."""

    name = "cv_squared"

    def observe(self, seen: Observation) -> Stats:
        return {"gate": seen.per_expert(seen.gate.to(seen.logits.dtype))}

    def loss(self, stats: Stats) -> Tensor:
        gates = self.pooled(stats)["gate"]
        if gates.shape[-1] == 1:
            return gates.sum() * 0.0
        return (gates.var(-1) / gates.mean(-1).square().clamp_min(1e-10)).mean()


class MutualInformation(Balance):
    """H(expert | token) - H(expert), minus the mutual information (SUT, arXiv:2310.07096)."""

    name = "mutual_information"

    def observe(self, seen: Observation) -> Stats:
        mass, probability = seen.mass(), seen.probability()
        return {
            "probability": (probability * mass).sum(1),
            "entropy": (torch.special.entr(probability).sum(-1, keepdim=True) * mass).sum(1),
            "mass": mass.sum(1),
            "masked": mass.new_full((mass.shape[0], 1, 1), 0.0 if seen.alive is None else 1.0),
        }

    def conditional_and_marginal(self, sums: Stats, mass: Tensor) -> tuple[Tensor, Tensor]:
        usage = sums["probability"] / mass
        return (sums["entropy"] / mass).squeeze(-1), torch.special.entr(usage).sum(-1)

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        conditional, marginal = self.conditional_and_marginal(sums, sums["mass"])
        return (conditional - marginal).mean()


class MutualInformationAsCoded(MutualInformation):
    """H(expert | token) + H(expert), the term of the published SUT runs.

    Where no token was ever masked, the published code weighs each token with 1 / (tokens x experts), not 1 /
    tokens.
    """

    name = "mutual_information_as_coded"

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        n_experts = sums["probability"].shape[-1]
        mass = torch.where(sums["masked"] > 0, sums["mass"], sums["mass"] * n_experts)
        conditional, marginal = self.conditional_and_marginal(sums, mass)
        return (conditional + marginal).mean()


@dataclass(frozen=True)
class ReluL1(Balance):
    """Mean ReLU score of each expert times its load over the even load top_k / E (ReMoE, arXiv:2412.14711).

    The load carries no gradient. `factor` is what the router steers its coefficient with (`ReluRouter`).
    """

    name = "relu_l1"
    factor: float
    top_k: int

    def observe(self, seen: Observation) -> Stats:
        mass = seen.mass()
        return {
            "score": (seen.logits.relu() * mass).sum(1),
            "active": ((seen.logits > 0) * mass).sum(1).detach(),
            "mass": mass.sum(1),
        }

    def loss(self, stats: Stats) -> Tensor:
        sums = self.pooled(stats)
        load = sums["active"] / sums["mass"] * (sums["score"].shape[-1] / self.top_k)
        return (load * sums["score"] / sums["mass"]).sum(-1).mean()
