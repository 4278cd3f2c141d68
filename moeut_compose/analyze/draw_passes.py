"""Figures that compare the passes through shared layers: where experts work, and whether tokens meet them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize

from moeut_compose.analyze.draw import INK, WIDTH, heat_map, new_figure, some
from moeut_compose.analyze.draw_routers import roles
from moeut_compose.analyze.overlap import mean_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moeut_compose.analyze.collect import Figures, RouterFigures
    from moeut_compose.analyze.names import Names

Groups = dict[str, list["RouterFigures"]]


def shared_routers(seen: Figures) -> Groups:
    """The routers of layers that run in several passes, by their place in a layer."""
    groups = {
        role: [router for router in routers if router.n_repeats > 1] for role, routers in roles(seen).items()
    }
    return {role: routers for role, routers in groups.items() if routers}


def draw_expert_depth(seen: Figures, names: Names) -> Figure | None:
    """In which pass each expert of a shared layer is used."""
    groups = shared_routers(seen)
    if not groups:
        return None
    tallest = max(router.n_repeats for routers in groups.values() for router in routers)
    norm = Normalize(0, 2 / tallest)
    figure = new_figure(len(groups) * (1.1 + 0.2 * tallest) + 0.2)
    for router, axes in _panels(figure, groups, names):
        rows = [str(number + 1) for number in range(router.n_repeats)]
        mesh = heat_map(axes, passes_of_experts(router), norm=norm, rows=rows)
        axes.set_xlabel("experts, by their mean pass" if axes.get_subplotspec().is_last_row() else "")
    bar = figure.colorbar(mesh, ax=figure.axes, label="share of an expert's uses", extend="max", aspect=32)
    bar.outline.set_edgecolor(INK)
    return figure


def passes_of_experts(router: RouterFigures) -> np.ndarray:
    """`[R, U]` where each used expert is used, columns adding up to one, by mean pass."""
    uses = router.usage.share * router.usage.tokens[:, None, None]
    uses = uses.reshape(router.n_repeats, -1)
    uses = uses[:, uses.sum(0) > 0]
    share = uses / uses.sum(0)
    return share[:, np.argsort((share * np.arange(len(share))[:, None]).sum(0), kind="stable")]


def draw_overlap(seen: Figures, names: Names) -> Figure | None:
    """Similarity of the expert sets of a token in different passes."""
    groups = shared_routers(seen)
    if not groups:
        return None
    n_columns = max(len(some(routers)) for routers in groups.values())
    figure = new_figure(2.6 * len(groups), width=min(WIDTH, 1.0 + 2.9 * n_columns))
    for router, axes in _panels(figure, groups, names):
        passes = [str(number + 1) for number in range(router.n_repeats)]
        mesh = heat_map(
            axes,
            router.overlap.between,
            norm=Normalize(0, 1),
            rows=passes,
            columns=passes,
            numbers=router.n_repeats <= 6,
        )
        axes.set_aspect("equal")
        title = f"{axes.get_title()}\nunrelated tokens: {mean_of(router.overlap.unrelated):.2f}"
        axes.set_title(title, fontsize=8.5)
    bar = figure.colorbar(mesh, ax=figure.axes, label="intersection / union", shrink=0.9, aspect=28)
    bar.outline.set_edgecolor(INK)
    return figure


def _panels(figure: Figure, groups: Groups, names: Names) -> Iterator[tuple[RouterFigures, Any]]:
    """A row for each role and a column for each of some members; titles and the side are written."""
    n_columns = max(len(some(routers)) for routers in groups.values())
    grid = figure.subplots(len(groups), n_columns, squeeze=False)
    for (role, routers), row in zip(groups.items(), grid, strict=True):
        shown = some(routers)
        for axes in row[len(shown) :]:
            axes.set_visible(False)
        for router, axes in zip(shown, row, strict=False):
            axes.set_title(f"{names.member(router.name.stage, router.name.member)}: {names.role(role)}")
            yield router, axes
        row[0].set_ylabel("pass")
