"""Adaptive computation time as first published: a sum of halting probabilities that ends in a remainder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moeut_compose.blocks.halting import Halted, Halting, HaltingState, depth_stats
from moeut_compose.blocks.initialisation import uniform_
from moeut_compose.blocks.precision import at_least_float32


@dataclass(frozen=True, kw_only=True)
class GravesState(HaltingState):
    """Also the sums of the rule over the passes so far; `[B, T]` unless they say otherwise."""

    total: Tensor
    """Sum of the weights."""
    mixed: Tensor
    """`[B, T, D]` sum of the weighed states."""
    passes: Tensor
    """Passes that the token ran in; no gradient."""
    remainder: Tensor
    """The last weight of tokens that have stopped, else zero."""

    @property
    def running(self) -> Tensor:
        """Who runs, as booleans."""
        return torch.ones_like(self.total, dtype=torch.bool) if self.alive is None else self.alive > 0

    def weigh(self, weight: Tensor, stops: Tensor) -> GravesState:
        """After a pass: `weight` of the new state for tokens that run; for those that stop it is the last."""
        return replace(
            self,
            alive=(self.running & ~stops).to(weight.dtype),
            total=self.total + weight * self.running,
            mixed=self.mixed + (weight * self.running)[..., None] * self.hidden,
            passes=self.passes + self.running,
            remainder=torch.where(self.running & stops, weight, self.remainder),
        )


class GravesACT(Halting[GravesState]):
    """Adaptive computation time (arXiv:1603.08983), for each position as in the Universal Transformer.

    After pass n a sigmoid gate gives each running token a probability a_n. Where their sum reaches the
    threshold, the token stops: its last weight is the remainder 1 - (a_1 + ... + a_(n-1)), and its state
    stays as it is for others to attend to. After the last pass every token stops. The output is the weighed
    sum of the states, the loss the mean of passes plus remainder, with gradient through the remainder alone.
    """

    def __init__(self, d_model: int, *, threshold: float, weight: float, gate_bias: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight = weight
        self.gate_bias = gate_bias
        self.gate = nn.Linear(d_model, 1)

    def reset_parameters(self) -> None:
        uniform_(self.gate.weight, bound=self.gate.in_features**-0.5)
        nn.init.constant_(self.gate.bias, self.gate_bias)

    def begin(self, x: Tensor) -> GravesState:
        mixed = torch.zeros_like(at_least_float32(x))
        zero = mixed[..., 0]
        return GravesState(hidden=x, context=x, total=zero, mixed=mixed, passes=zero, remainder=zero)

    def decide(self, state: GravesState, repeat: int) -> GravesState:
        probability = at_least_float32(self.gate(state.hidden)).sigmoid().squeeze(-1)
        stops = state.total + probability >= self.threshold
        return state.weigh(torch.where(stops, 1.0 - state.total, probability), stops)

    def absorb(self, state: GravesState, hidden: Tensor) -> GravesState:
        if state.alive is not None:
            hidden = torch.where(state.alive[..., None] > 0, hidden, state.hidden)
        return replace(state, hidden=hidden, context=hidden)

    def finish(self, state: GravesState) -> Halted:
        end = state.weigh(1.0 - state.total, torch.ones_like(state.running))
        losses = {"act": self.weight * (end.passes + end.remainder).mean()} if self.training else {}
        return Halted(end.mixed.to(state.hidden.dtype), losses, depth_stats(end.passes))
