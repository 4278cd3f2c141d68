"""The calls of one router in one batch, side by side: what statistics of routing read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moeut_compose.analyze.observe import Application


class RouterName(NamedTuple):
    """A router: the layer it belongs to and its place there."""

    stage: int
    member: int
    role: str


@dataclass(frozen=True)
class RouterCalls:
    """Legend: R repeats, B windows, T positions, H heads, E experts."""

    gate: Tensor
    """`[R, B, T, H, E]`, zero where an expert was not chosen."""
    logits: Tensor
    """`[R, B, T, H, E]`"""
    runs: Tensor
    """`[R, B, T]` booleans: the tokens that were routed."""
    ids: Tensor
    """`[B, T]`"""
    positions: Tensor
    """`[B, T]` places of the tokens in the text."""

    @cached_property
    def chosen(self) -> Tensor:
        """`[R, B, T, H, E]` booleans; nothing for tokens at rest."""
        return (self.gate > 0) & self.runs[..., None, None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """R, H, E."""
        repeats, _, _, heads, experts = self.gate.shape
        return repeats, heads, experts


def router_calls(
    applications: Sequence[Application], ids: Tensor, positions: Tensor
) -> dict[RouterName, RouterCalls]:
    """The calls of every router that has a choice, by repeat; a router of one expert has none."""
    grouped: dict[RouterName, list[Application]] = {}
    for application in applications:
        for role, choice in application.choices.items():
            if choice.gate.shape[-1] > 1:
                name = RouterName(application.stage, application.member, role)
                grouped.setdefault(name, []).append(application)
    calls = {}
    for name, group in grouped.items():
        choices = [one.choices[name.role] for one in sorted(group, key=lambda one: one.repeat)]
        gate, logits, runs = (torch.stack(parts) for parts in zip(*choices, strict=True))
        calls[name] = RouterCalls(gate, logits, runs, ids, positions)
    return calls
