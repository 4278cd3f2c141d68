"""How evenly routers use their experts and how deep tokens go, from sums that the forward pass returns anyway.

A router is judged by the tokens that chose each expert where its terms count them, and by the probability mass that its
balance term observed otherwise. Routers without any term return nothing, and have no columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeut_compose.blocks.stats import Stats, pool

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = (
    "load",
    "switch.count",
    "relu_l1.active",
    "entropy.probability",
    "mutual_information.probability",
    "mutual_information_as_coded.probability",
    "cv_squared.gate",
)
"""Sums by expert `[H, E]` below the name of a router, the best first."""
HALTING = (".halting.passes", ".halting.tokens")
DEAD_BELOW = 0.01
"""Share of an even load below which an expert counts as dead."""


class RouterLoads:
    """Sums over the steps since the last row, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: Stats = {}

    def add(self, stats: Stats, skipped: Tensor) -> None:
        """Count the `totals` of one step, unless the boolean scalar `skipped` is set."""
        seen = {
            name: torch.where(skipped, 0.0, value.double()) for name, value in _what_matters(stats).items()
        }
        self._sums = pool(self._sums, seen)

    def columns(self) -> dict[str, float]:
        """By router: largest load over the mean load, entropy of the usage in nats, dead experts; by stage: passes.

        Where a router chooses for each head on its own, the largest load is that of all heads, the entropy their mean
        and the dead experts their sum.
        """
        columns: dict[str, float] = {}
        for name, total in self._sums.items():
            if name.endswith(HALTING[0]):
                stage = name.removesuffix(HALTING[0])
                columns[f"depth.{stage}"] = (total.sum() / self._sums[stage + HALTING[1]].sum()).item()
            elif not name.endswith(HALTING[1]):
                columns |= {f"load.{name}.{key}": value for key, value in _evenness(total.cpu()).items()}
        return columns

    def clear(self) -> None:
        self._sums = {}

    def state_dict(self) -> Stats:
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, state: Stats) -> None:
        self._sums = {name: value.to(self._device) for name, value in state.items()}


def _what_matters(stats: Stats) -> Stats:
    """One sum by expert for each router, under the router's name, and what halting rules report."""
    chosen = {name: value for name, value in stats.items() if name.endswith(HALTING)}
    for source in SOURCES:
        for name, value in stats.items():
            router = name.removesuffix(f".{source}")
            if router != name:
                chosen.setdefault(router, value)
    return chosen


def _evenness(load: Tensor) -> dict[str, float]:
    """Figures of the loads `[H, E]` of one router."""
    share = load / load.sum(-1, keepdim=True).clamp_min(torch.finfo(load.dtype).tiny)
    relative = share * load.shape[-1]
    return {
        "max_over_mean": relative.max().item(),
        "entropy": torch.special.entr(share).sum(-1).mean().item(),
        "dead_experts": int((relative < DEAD_BELOW).sum()),
    }
