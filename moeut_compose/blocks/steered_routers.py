"""Routers that feedback steers: buffers which no gradient reaches, adjusted after each optimiser step.

A forward pass reads the buffers and returns what it saw; `steer_routers` writes them. So recomputing a layer
changes nothing, and the sums may be pooled over micro-batches and devices first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeut_compose.blocks.balance import Balance, Observation, ReluL1
from moeut_compose.blocks.roles import Alive, Router, Routing
from moeut_compose.blocks.routers import LinearRouter
from moeut_compose.blocks.stats import Stats, below


class BiasedSigmoidRouter(LinearRouter):
    """Choice by sigmoid + bias, weights by sigmoid alone (arXiv:2408.15664).

    After each step the bias of every expert moves by `update_rate`: up if its load was below the mean, down
    if above.
    """

    selection_bias: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        update_rate: float,
        normalize: bool,
        gate_scale: float = 1.0,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(
            d_model, n_experts=n_experts, top_k=top_k, expert_dropout=expert_dropout, balance=balance
        )
        self.observes = True
        self.update_rate = update_rate
        self.normalize = normalize
        self.gate_scale = gate_scale
        self.register_buffer("selection_bias", torch.empty(n_experts))

    def reset_parameters(self, *, scale: float) -> None:
        super().reset_parameters(scale=scale)
        self.selection_bias.zero_()

    def forward(self, x: Tensor, alive: Alive | None) -> Routing:
        logits = self.logits(x)
        score = logits.sigmoid()
        chosen, index = self.hide(score + self.selection_bias).topk(self.top_k, dim=-1, sorted=False)
        lowest = torch.finfo(chosen.dtype).min
        gate = score.gather(-1, index).masked_fill(chosen == lowest, 0.0)
        if self.normalize:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(torch.finfo(gate.dtype).tiny)
        return self.routing(logits, index, gate * self.gate_scale, alive)

    def observe(self, seen: Observation) -> Stats:
        return super().observe(seen) | {"load": seen.load()}

    @torch.no_grad()
    def steer(self, stats: Stats) -> None:
        load = stats["load"].reshape(-1, self.n_experts).sum(0)
        self.selection_bias += self.update_rate * (load.mean() - load).sign().to(self.selection_bias)


class ReluRouter(LinearRouter):
    """At most `max_active` experts with a positive score, weighed by it (ReMoE, arXiv:2412.14711).

    Where the balance terms hold `ReluL1`, its coefficient times `multiplier` keeps the mean number of active
    experts at `top_k`.
    """

    multiplier: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        max_active: int,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(
            d_model, n_experts=n_experts, top_k=top_k, expert_dropout=expert_dropout, balance=balance
        )
        self.max_active = max_active
        self.register_buffer("multiplier", torch.empty(()))

    @property
    def n_choices(self) -> int:
        return self.max_active

    def reset_parameters(self, *, scale: float) -> None:
        super().reset_parameters(scale=scale)
        self.multiplier.fill_(1.0)

    def forward(self, x: Tensor, alive: Alive | None) -> Routing:
        logits = self.logits(x)
        score, index = self.hide(logits).topk(self.max_active, dim=-1, sorted=False)
        return self.routing(logits, index, score.relu(), alive)

    def losses(self, stats: Stats) -> dict[str, Tensor]:
        losses = super().losses(stats)
        if ReluL1.name in losses:
            losses[ReluL1.name] = losses[ReluL1.name] * self.multiplier
        return losses

    @torch.no_grad()
    def steer(self, stats: Stats) -> None:
        for term in self.balance:
            if isinstance(term, ReluL1):
                sums = below(term.name, stats)
                n_active = sums["active"].sum() / sums["mass"].sum()
                self.multiplier *= term.factor ** (n_active - self.top_k).sign().to(self.multiplier)


def any_steered(model: nn.Module) -> bool:
    """Whether `steer_routers` has anything to do."""
    return any(
        isinstance(module, Router) and type(module).steer is not Router.steer for module in model.modules()
    )


def steer_routers(model: nn.Module, stats: Stats) -> None:
    """Adjust what feedback controls in all routers of `model` from the `stats` of one optimiser step.

    `stats` are those of a `ModelOutput` in training mode, added up over the micro-batches of the step and
    over devices (`totals` of each, which no longer depend on the size of a micro-batch). Call it after the
    optimiser.
    """
    for name, module in model.named_modules():
        if isinstance(module, Router):
            seen = below(name, stats)
            if seen:
                module.steer(seen)
