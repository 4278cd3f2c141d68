"""A stage: a group of layers that runs several times over shared weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeut_compose.blocks.cache import Memory, Start
from moeut_compose.blocks.halting import AnyHalting, HaltingState
from moeut_compose.blocks.layers import Layer
from moeut_compose.blocks.loops import Injection, StepEmbedding
from moeut_compose.blocks.roles import Alive, Call, Copies, Router, Tickets
from moeut_compose.blocks.stats import Repeats, Stats, append, below, pool, under


class StageRun(NamedTuple):
    """What a stage returns."""

    hidden: Tensor
    """`[B, T, D]`"""
    losses: dict[str, Tensor]
    stats: Stats
    by_repeat: Repeats
    """What `stats` pools, without gradient."""
    memories: tuple[Memory, ...]
    """One entry per layer application, in running order."""


class Stage(nn.Module):
    """Layers and the order in which they run; `schedule` holds `(member, repeat)` pairs."""

    skips_resting: bool
    """Leave tokens at rest out of expert products: less work, the same results, a wait for the device."""
    defers: bool
    """Form the gradients of experts once for all their uses: less traffic, but rows of all uses stay to the end."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        schedule: Sequence[tuple[int, int]],
        halting: AnyHalting,
        injection: Injection,
        step: StepEmbedding,
    ) -> None:
        super().__init__()
        self.skips_resting = False
        self.defers = True
        self.layers = nn.ModuleList(layers)
        self.schedule = tuple(schedule)
        self.halting = halting
        self.injection = injection
        self.step = step

    def reset_parameters(self, *, layer_scales: Sequence[float]) -> None:
        """Draw all weights; `layer_scales[member]` is the depth factor c of the published initialisation."""
        self.halting.reset_parameters()
        self.injection.reset_parameters()
        self.step.reset_parameters()
        for layer, scale in zip(self.layers, layer_scales, strict=True):
            assert isinstance(layer, Layer)
            layer.reset_parameters(scale=scale)

    def forward(
        self, x: Tensor, *, start: Start = 0, past: Sequence[Memory] = (), remember: bool = True
    ) -> StageRun:
        """Run all applications on `x [B, T, D]`; `past` has one memory per application, or is empty.

        Without `remember` no memories are kept for a later call.
        """
        copies = self._copies(x)
        tickets = self._tickets(x, copies)
        state = self.halting.begin(x)
        stats: Stats = {}
        by_repeat: Repeats = {}
        memories: list[Memory] = []
        call = Call(repeat=-1, start=start, remember=remember)
        for application, (member, repeat) in enumerate(self.schedule):
            hidden, context = state.hidden, state.context
            if repeat != call.repeat:
                if repeat > 0:
                    state = self.halting.decide(state, repeat)
                call = Call(repeat, start, self._alive(state), remember)
                hidden, context = self._enter(state, x, call)
            memory = past[application] if past else None
            given = call._replace(copies=copies[member], tickets=next(tickets[member], None))
            hidden, seen, memory = self.layers[member](hidden, context, given, memory)
            state = self.halting.absorb(state, hidden)
            seen = under(f"layers.{member}", seen)
            stats, by_repeat = pool(stats, seen), append(by_repeat, seen)
            if memory is not None:
                memories.append(memory)
        output, halting_losses, halting_stats = self.halting.finish(state)
        losses = under("halting", halting_losses) | self._balance_losses(stats)
        return StageRun(output, losses, stats | under("halting", halting_stats), by_repeat, tuple(memories))

    def _copies(self, x: Tensor) -> list[Copies | None]:
        """For each member, its expert weights in the dtype of autocast, made once for all its uses."""
        kind = x.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return [None] * len(self.layers)
        dtype = torch.get_autocast_dtype(kind)
        return [
            None if isinstance(next(layer.parameters()), DTensor) else layer.copies(dtype)
            for layer in self.layers
        ]

    def _tickets(self, x: Tensor, copies: Sequence[Copies | None]) -> list[Iterator[Tickets]]:
        """For each member that runs several times, tickets of its calls: gradients of its experts are formed once."""
        if not torch.is_grad_enabled() or self.skips_resting or not self.defers:
            return [iter(()) for _ in self.layers]
        members = [member for member, _ in self.schedule]
        n_calls = [members.count(member) for member in range(len(self.layers))]
        n_tokens = x.shape[0] * x.shape[1]
        return [
            iter(() if of_member is None or calls == 1 else layer.tickets(calls, n_tokens, of_member))
            for layer, of_member, calls in zip(self.layers, copies, n_calls, strict=True)
        ]

    def _enter(self, state: HaltingState, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """What the first layer of a pass reads instead of `state.hidden` and `state.context`."""

        def entered(part: Tensor) -> Tensor:
            part = self.injection.start(part) if call.repeat == 0 else self.injection(part, x)
            return self.step(part, call.repeat, call.start)

        hidden = entered(state.hidden)
        return hidden, hidden if state.context is state.hidden else entered(state.context)

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


def defer_gradients(model: nn.Module, defer: bool = True) -> None:
    """Let all stages of `model` form the gradients of expert weights once for all their uses, or use by use."""
    for module in model.modules():
        if isinstance(module, Stage):
            module.defers = defer
