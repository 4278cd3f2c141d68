"""Halting: how much of each token goes on to the next pass through a stage.

A rule is a role with `begin / decide / absorb / finish` over an explicit state. Layers read the state's
`hidden` (queries and residual), `context` (keys and values) and `alive` (mass not yet halted).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeut_compose.blocks.initialisation import uniform_
from moeut_compose.blocks.precision import at_least_float32
from moeut_compose.blocks.stats import Stats


@dataclass(frozen=True)
class HaltingState:
    """Where every token of a stage stands. Tensors are `[B, T]` unless they say otherwise."""

    hidden: Tensor
    """`[B, T, D]` the state that layers update."""
    context: Tensor
    """`[B, T, D]` what keys and values are read from, and the output at the end."""
    alive: Tensor | None = None
    """Probability of not having halted, zero below the threshold; None before the first decision."""
    log_alive: Tensor | None = None
    mixed: Tensor | None = None
    """`[B, T, D]` sum of halted states, each weighed with its probability."""
    depth: Tensor | None = None
    """Expected depth of the halted mass."""
    ponder: Tensor | None = None
    """Sum over passes of the mean expected depth, a scalar."""
    expected: Tensor | None = None
    """Mean expected depth after the last pass, a scalar."""


class Halting(nn.Module, ABC):
    """Decides before every pass but the first which tokens go on."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the weights."""

    @abstractmethod
    def begin(self, x: Tensor) -> HaltingState:
        """The state before the first pass."""

    @abstractmethod
    def decide(self, state: HaltingState, repeat: int) -> HaltingState:
        """The state before pass `repeat` (from 0)."""

    @abstractmethod
    def absorb(self, state: HaltingState, hidden: Tensor) -> HaltingState:
        """The state after a layer has turned `state.hidden` into `hidden`."""

    @abstractmethod
    def finish(self, state: HaltingState) -> tuple[dict[str, Tensor], Stats]:
        """Weighted losses and statistics. The output of the stage is `state.context`."""


class NoHalting(Halting):
    """Every token takes every pass."""

    def reset_parameters(self) -> None:
        pass

    def begin(self, x: Tensor) -> HaltingState:
        return HaltingState(hidden=x, context=x)

    def decide(self, state: HaltingState, repeat: int) -> HaltingState:
        return state

    def absorb(self, state: HaltingState, hidden: Tensor) -> HaltingState:
        return HaltingState(hidden=hidden, context=hidden)

    def finish(self, state: HaltingState) -> tuple[dict[str, Tensor], Stats]:
        return {}, {}


class StickBreaking(Halting):
    """The halting rule of SUT (arXiv:2310.07096), as in the published runs.

    After pass n a gate turns each hidden state into log-probabilities of going on and of halting. The halted
    mixture plus the rest of the mass times the newest state is what later passes read keys and values from. A
    token whose remaining mass falls below 1 - threshold keeps its mixture. All passes run. Halting after the
    first pass counts as depth 0; the loss is the mean expected depth, summed over passes.
    """

    def __init__(self, d_model: int, *, threshold: float, weight: float) -> None:
        super().__init__()
        self.remainder = 1.0 - threshold
        self.weight = weight
        self.inner = nn.Linear(d_model, d_model)
        self.outer = nn.Linear(d_model, 2, bias=False)

    def reset_parameters(self) -> None:
        for weight in (self.inner.weight, self.inner.bias):
            uniform_(weight, bound=self.inner.in_features**-0.5)
        nn.init.zeros_(self.outer.weight)

    def begin(self, x: Tensor) -> HaltingState:
        return HaltingState(hidden=x, context=x)

    def decide(self, state: HaltingState, repeat: int) -> HaltingState:
        if repeat == 0:
            return state
        hidden = state.hidden
        go_on, halt = at_least_float32(self.outer(F.gelu(self.inner(hidden)))).log_softmax(-1).unbind(-1)
        zero = torch.zeros_like(go_on)
        log_alive = zero if state.log_alive is None else state.log_alive
        halted = (log_alive + halt).exp()
        log_alive = log_alive + go_on
        share = halted[..., None] * hidden
        alive = log_alive.exp()
        alive = torch.where(alive < self.remainder, zero, alive)
        depth = (zero if state.depth is None else state.depth) + (repeat - 1) * halted
        expected = (depth + alive * repeat).mean()
        return replace(
            state,
            alive=alive,
            log_alive=log_alive,
            mixed=share if state.mixed is None else state.mixed + share,
            depth=depth,
            ponder=expected if state.ponder is None else state.ponder + expected,
            expected=expected,
        )

    def absorb(self, state: HaltingState, hidden: Tensor) -> HaltingState:
        if state.alive is None or state.mixed is None:
            return replace(state, hidden=hidden, context=hidden)
        alive = state.alive[..., None]
        context = torch.where(alive == 0, state.context, state.mixed + alive * hidden)
        return replace(state, hidden=hidden, context=context)

    def finish(self, state: HaltingState) -> tuple[dict[str, Tensor], Stats]:
        if state.ponder is None or state.expected is None:
            return {}, {}
        losses = {"act": self.weight * state.ponder} if self.training else {}
        return losses, {"expected_depth": state.expected.detach()}
