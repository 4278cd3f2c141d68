"""How evenly routers use their experts and how deep tokens go, from sums that the forward pass returns anyway.

A router is judged by the tokens that chose each expert where its terms count them, and by the probability mass that its
balance term observed otherwise. Routers without any term return nothing, and have no columns. A router that runs
several times has a column for all its repeats together, and figures of each of them besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeut_compose.blocks.stats import Named, Stats, below, pool, under

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.blocks.stats import Repeats

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
REPEATS = "repeats"
"""What sums of single repeats are named below."""

FIGURES = ("max_over_mean", "entropy", "dead_experts")
ByRepeat = dict[str, dict[str, list[float | None]]]
"""By router and figure, a value for each repeat; None where no token came to it."""


class RouterLoads:
    """Sums over the steps since the last row, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: Stats = {}

    def add(self, stats: Stats, skipped: Tensor) -> None:
        """Count the `totals` and `loads_by_repeat` of one step, unless the boolean scalar `skipped` is set."""
        pooled = {name: value for name, value in stats.items() if name.endswith(HALTING)} | _best(stats)
        matters = pooled | under(REPEATS, below(REPEATS, stats))
        seen = {name: torch.where(skipped, 0.0, value.double()) for name, value in matters.items()}
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
            elif not name.endswith(HALTING[1]) and not name.startswith(f"{REPEATS}."):
                columns |= {f"load.{name}.{key}": value for key, value in _evenness(total.cpu()).items()}
        return columns

    def by_repeat(self) -> ByRepeat:
        """The same figures of each repeat, for the routers that run several times."""
        return {
            router: _by_figure([_evenness(load) if load.any() else None for load in loads.cpu()])
            for router, loads in below(REPEATS, self._sums).items()
        }

    def clear(self) -> None:
        self._sums = {}

    def state_dict(self) -> Stats:
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, state: Stats) -> None:
        self._sums = {name: value.to(self._device) for name, value in state.items()}


def loads_by_repeat(by_repeat: Repeats) -> Stats:
    """The sums by expert `[R, H, E]`, over the batch, of the routers that run several times: `repeats.<router>`."""
    several = {name: sums for name, sums in by_repeat.items() if len(sums) > 1}
    return under(REPEATS, {router: torch.stack(sums).sum(1) for router, sums in _best(several).items()})


def _best(stats: dict[str, Named]) -> dict[str, Named]:
    """One sum by expert for each router, under the router's name."""
    chosen: dict[str, Named] = {}
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
    entropy = torch.special.entr(share).sum(-1).mean()
    figures = relative.max().item(), entropy.item(), int((relative < DEAD_BELOW).sum())
    return dict(zip(FIGURES, figures, strict=True))


def _by_figure(repeats: list[dict[str, float] | None]) -> dict[str, list[float | None]]:
    """The figures of all repeats, side by side."""
    return {name: [None if one is None else one[name] for one in repeats] for name in FIGURES}
