"""A stage: a group of layers that runs several times over shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from moeut_compose.blocks.cache import Memory
from moeut_compose.blocks.halting import AnyHalting, HaltingState
from moeut_compose.blocks.layers import Layer
from moeut_compose.blocks.roles import Alive, Router
from moeut_compose.blocks.stats import Stats, below, pool, under


class StageRun(NamedTuple):
    """What a stage returns."""

    hidden: Tensor
    """`[B, T, D]`"""
    losses: dict[str, Tensor]
    stats: Stats
    memories: tuple[Memory, ...]
    """One entry per layer application, in running order."""


class Stage(nn.Module):
    """Layers and the order in which they run; `schedule` holds `(member, repeat)` pairs."""

    skips_resting: bool
    """Leave tokens at rest out of expert products: less work, the same results, a wait for the device."""

    def __init__(
        self, layers: Sequence[Layer], *, schedule: Sequence[tuple[int, int]], halting: AnyHalting
    ) -> None:
        super().__init__()
        self.skips_resting = False
        self.layers = nn.ModuleList(layers)
        self.schedule = tuple(schedule)
        self.halting = halting

    def forward(self, x: Tensor, *, start: int = 0, past: Sequence[Memory] = ()) -> StageRun:
        """Run all applications on `x [B, T, D]`; `past` has one memory per application, or is empty."""
        state = self.halting.begin(x)
        stats: Stats = {}
        memories: list[Memory] = []
        before = 0
        for application, (member, repeat) in enumerate(self.schedule):
            if repeat != before:
                state, before = self.halting.decide(state, repeat), repeat
            hidden, seen, memory = self.layers[member](
                state.hidden,
                state.context,
                alive=self._alive(state),
                start=start,
                past=past[application] if past else None,
            )
            state = self.halting.absorb(state, hidden)
            stats = pool(stats, under(f"layers.{member}", seen))
            memories.append(memory)
        output, halting_losses, halting_stats = self.halting.finish(state)
        losses = under("halting", halting_losses) | self._balance_losses(stats)
        return StageRun(output, losses, stats | under("halting", halting_stats), tuple(memories))

    def _alive(self, state: HaltingState) -> Alive | None:
        if state.alive is None:
            return None
        rows = state.alive.flatten().nonzero().squeeze(-1) if self.skips_resting else None
        return Alive(state.alive, rows)

    def _balance_losses(self, stats: Stats) -> dict[str, Tensor]:
        """Balance terms of every router from its pooled sums: each counts once, however often it ran."""
        losses: dict[str, Tensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, Router):
                losses |= under(name, module.losses(below(name, stats)))
        return losses


def skip_resting(model: nn.Module, skip: bool = True) -> None:
    """Let all stages of `model` leave tokens at rest out of expert products, or weigh them with zero."""
    for module in model.modules():
        if isinstance(module, Stage):
            module.skips_resting = skip
