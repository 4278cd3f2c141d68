"""Router statistics: additive sums that travel by return value.

`Stats` maps dotted names to tensors of sums, never histories: pooling the repeats of a shared router is one
addition per name, and recomputing a layer cannot count anything twice.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Stats = dict[str, Tensor]
Repeats = dict[str, tuple[Tensor, ...]]
"""The sums of each repeat, in order, before they are pooled."""
Named = TypeVar("Named")


def pool(left: Stats, right: Stats) -> Stats:
    """Add the sums of two calls name by name."""
    pooled = dict(left)
    for name, value in right.items():
        pooled[name] = pooled[name] + value if name in pooled else value
    return pooled


def append(repeats: Repeats, stats: Stats) -> Repeats:
    """The same repeats and one more, without its gradient."""
    return repeats | {name: (*repeats.get(name, ()), value.detach()) for name, value in stats.items()}


def totals(stats: Stats) -> Stats:
    """The sums over the batch, without gradient: what is reported, and what drives feedback between steps."""
    return {name: value.detach().sum(0) for name, value in stats.items()}


def under(prefix: str, stats: dict[str, Named]) -> dict[str, Named]:
    """The same sums (or whatever has such names), named below `prefix`."""
    return {f"{prefix}.{name}": value for name, value in stats.items()}


def below(prefix: str, stats: dict[str, Named]) -> dict[str, Named]:
    """The sums (or others) that `under` named below `prefix`, with their own names again."""
    return {name[len(prefix) + 1 :]: value for name, value in stats.items() if name.startswith(f"{prefix}.")}
