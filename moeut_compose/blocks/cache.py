"""Key/value cache: one entry per layer application, never per layer.

A shared layer that runs nine times has nine entries, because its keys differ at every depth. The cache is a
value: a forward pass returns a new one and leaves the old one as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Memory = tuple[Tensor, Tensor]
"""Keys and values of one application, each `[B, H, S, d_head]`, positions already applied to the keys."""


@dataclass(frozen=True)
class Cache:
    """What a model remembers of the `length` tokens it has seen. `Cache()` is empty."""

    length: int = 0
    memories: tuple[Memory, ...] = ()
