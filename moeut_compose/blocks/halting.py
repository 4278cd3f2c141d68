"""Halting: how much of each token goes on to the next pass through a stage.

A rule is a role with `begin / decide / absorb / finish` over an explicit state. Layers read the state's
`hidden` (queries and residual), `context` (keys and values) and `alive` (mass not yet halted). All passes
always run: a token at rest still serves others as key and value. What it costs is a choice of the stage, see
`Alive.rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from moeut_compose.blocks.stats import Stats


@dataclass(frozen=True)
class HaltingState:
    """Where every token of a stage stands."""

    hidden: Tensor
    """`[B, T, D]` the state that layers update."""
    context: Tensor
    """`[B, T, D]` what keys and values are read from."""
    alive: Tensor | None = None
    """`[B, T]` mass that has not halted, zero at rest; None before the first decision."""


class Halted(NamedTuple):
    """What a rule returns after the last pass."""

    output: Tensor
    """`[B, T, D]` the output of the stage."""
    losses: dict[str, Tensor]
    """Weighted terms; empty outside training."""
    stats: Stats


State = TypeVar("State", bound=HaltingState)


class Halting(nn.Module, ABC, Generic[State]):
    """Decides before every pass but the first which tokens go on."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the weights."""

    @abstractmethod
    def begin(self, x: Tensor) -> State:
        """The state before the first pass over `x [B, T, D]`."""

    @abstractmethod
    def decide(self, state: State, repeat: int) -> State:
        """The state before pass `repeat` (from 0; never called for the first)."""

    @abstractmethod
    def absorb(self, state: State, hidden: Tensor) -> State:
        """The state after a layer has turned `state.hidden` into `hidden`."""

    @abstractmethod
    def finish(self, state: State) -> Halted:
        """The output after the last pass."""


AnyHalting = Halting[Any]


class NoHalting(Halting[HaltingState]):
    """Every token takes every pass."""

    def reset_parameters(self) -> None:
        pass

    def begin(self, x: Tensor) -> HaltingState:
        return HaltingState(hidden=x, context=x)

    def decide(self, state: HaltingState, repeat: int) -> HaltingState:
        return state

    def absorb(self, state: HaltingState, hidden: Tensor) -> HaltingState:
        return HaltingState(hidden=hidden, context=hidden)

    def finish(self, state: HaltingState) -> Halted:
        return Halted(state.hidden, {}, {})


def depth_stats(passes: Tensor) -> Stats:
    """What rules report of the expected number of passes `[B, T]` of each token: its sum, and the tokens."""
    passes = passes.detach()
    return {
        "passes": passes.sum(1, keepdim=True),
        "tokens": passes.new_full((passes.shape[0], 1), passes.shape[1]),
    }
