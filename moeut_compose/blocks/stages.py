"""A stage: a group of layers that runs several times over shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from moeut_compose.blocks.cache import Memory
from moeut_compose.blocks.halting import Halting
from moeut_compose.blocks.layers import Layer
from moeut_compose.blocks.roles import Router
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

    def __init__(
        self, layers: Sequence[Layer], *, schedule: Sequence[tuple[int, int]], halting: Halting
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.schedule = tuple(schedule)
        self.halting = halting

    def forward(self, x: Tensor, *, start: int = 0, past: Sequence[Memory] = ()) -> StageRun:
        """Run all applications on `x [B, T, D]`; `past` has one memory per application, or is empty."""
        state = self.halting.begin(x)
        stats: Stats = {}
        memories: list[Memory] = []
        before = -1
        for application, (member, repeat) in enumerate(self.schedule):
            if repeat != before:
                state, before = self.halting.decide(state, repeat), repeat
            hidden, seen, memory = self.layers[member](
                state.hidden,
                state.context,
                alive=state.alive,
                start=start,
                past=past[application] if past else None,
            )
            state = self.halting.absorb(state, hidden)
            stats = pool(stats, under(f"layers.{member}", seen))
            memories.append(memory)
        losses, halting_stats = self.halting.finish(state)
        losses = under("halting", losses) | self._balance_losses(stats)
        return StageRun(state.context, losses, stats | under("halting", halting_stats), tuple(memories))

    def _balance_losses(self, stats: Stats) -> dict[str, Tensor]:
        """Balance terms of every router from its pooled sums: each counts once, however often it ran."""
        losses: dict[str, Tensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, Router):
                losses |= under(name, module.losses(below(name, stats)))
        return losses
