"""Key/value cache: one entry per layer application, never per layer.

A shared layer that runs nine times has nine entries, because its keys differ at every depth. The cache is a
value: a forward pass returns a new one and leaves the old one as it was. A cache with room gives that up: its
memories are written in place, behind what each sequence has filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Memory = tuple[Tensor, Tensor]
"""Keys and values of one application, each `[B, H, S, d_head]`, positions already applied to the keys."""

Start = int | Tensor
"""Position of the first new token: a number for all sequences, or integers `[B]` where memories have room."""


def positions(start: Start, length: int, device: torch.device) -> Tensor:
    """Positions of `length` new tokens: `[T]`, or `[B, T]` where every sequence has a start of its own."""
    if isinstance(start, int):
        return torch.arange(start, start + length, device=device)
    return start[:, None] + torch.arange(length, device=device)


@dataclass(frozen=True)
class Cache:
    """What a model remembers of the `length` tokens it has seen. `Cache()` is empty."""

    length: Start = 0
    memories: tuple[Memory, ...] = ()

    def with_room(self, lengths: Tensor, capacity: int) -> Cache:
        """The same memories with room for `capacity` positions, `lengths [B]` of which each sequence has filled.

        What lies behind the length of a sequence, such as padding on the right, is never seen and overwritten.
        Shapes no longer change from call to call, and the length stays on the device.
        """

        def roomy(part: Tensor) -> Tensor:
            batch, heads, filled, d_head = part.shape
            wide = part.new_zeros(batch, heads, max(capacity, filled), d_head)
            wide[:, :, :filled] = part
            return wide

        return Cache(lengths, tuple((roomy(key), roomy(value)) for key, value in self.memories))
