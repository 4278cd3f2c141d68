"""Figures of routers: loads, sharpness, token or context, token diversity, co-occurrence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm

from moeut_compose.analyze.draw import (
    COLOURS,
    DIVERGING,
    INK,
    application_axis,
    colour,
    heat_map,
    log_axis,
    new_figure,
    some,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moeut_compose.analyze.collect import Figures, RouterFigures
    from moeut_compose.analyze.names import Names

LINES = ("o-", "s-", "^-", "D-")


def roles(seen: Figures) -> dict[str, list[RouterFigures]]:
    """The routers by their place in a layer."""
    found: dict[str, list[RouterFigures]] = {}
    for router in seen.routers:
        found.setdefault(router.name.role, []).append(router)
    return found


def by_application(seen: Figures, role: str, values: str) -> dict[int, Any]:
    """One figure of `Usage` for each application that has the router, by its place in running order."""
    of = {(router.name.stage, router.name.member): router for router in roles(seen)[role]}
    return {
        place: getattr(of[step.stage, step.member].usage, values)[step.repeat]
        for place, step in enumerate(seen.steps)
        if (step.stage, step.member) in of
    }


def draw_load(seen: Figures, names: Names) -> Figure | None:
    """Uses of the experts of every application, from the most used to the least."""
    groups = roles(seen)
    if not groups:
        return None
    labels = [names.application(step) for step in seen.steps]
    heights = [0.9 + 2.6 * min(1, len(by_application(seen, role, "load")) / 18) for role in groups]
    figure = new_figure(sum(heights) + 0.3)
    panels = np.atleast_1d(figure.subplots(len(groups), 1, height_ratios=heights))
    for role, axes in zip(groups, panels, strict=True):
        loads = by_application(seen, role, "load")
        widest = max(load.size for load in loads.values())
        cells = np.full((len(loads), widest), np.nan)
        for row, load in enumerate(loads.values()):
            if load.any():  # no token may have come that deep
                cells[row, : load.size] = -np.sort(-load, axis=None)
        mesh = heat_map(
            axes,
            cells.clip(1 / 16, 16),
            norm=LogNorm(1 / 16, 16),
            colours=DIVERGING,
            rows=[labels[place] for place in loads],
        )
        axes.set(title=names.role(role), ylabel="application")
    panels[-1].set_xlabel("experts, the most used first")
    bar = figure.colorbar(mesh, ax=list(panels), label="uses relative to an even share", aspect=32)
    bar.ax.minorticks_off()
    bar.set_ticks([1 / 16, 1 / 4, 1, 4, 16], labels=["≤1/16", "1/4", "even", "4", "≥16"])
    return figure


def draw_sharpness(seen: Figures, names: Names) -> Figure | None:
    """How undecided routers are for a token, and how evenly they use experts over all tokens."""
    groups = roles(seen)
    if not groups:
        return None
    figure = new_figure(5.6)
    entropy, ratio = figure.subplots(2, 1)
    labels = [names.application(step) for step in seen.steps]
    for index, (role, routers) in enumerate(groups.items()):
        shade, style = colour(index, len(groups)), LINES[index % len(LINES)]
        highest = np.log(routers[0].n_experts)
        for values, line, label in (
            ("usage_entropy", style.replace("-", ":"), f"{names.role(role)}: all tokens"),
            ("entropy", style, f"{names.role(role)}: one token"),
        ):
            points = by_application(seen, role, values)
            relative = np.array(list(points.values())) / highest
            entropy.plot(list(points), relative, line, color=shade, label=label)
        points = by_application(seen, role, "top1_over_median")
        ratio.plot(list(points), list(points.values()), style, color=shade, label=names.role(role))
    entropy.set(ylabel="entropy / ln(experts)")
    entropy.set_ylim(0, 1.05)
    ratio.set(ylabel="largest / median probability", xlabel="application, in running order", yscale="log")
    log_axis(ratio.yaxis)
    entropy.legend(ncols=min(2, len(groups)), loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8.5)
    for axes in (entropy, ratio):
        application_axis(axes, labels)
        axes.grid(axis="y")
    return figure


def draw_token_or_context(seen: Figures, names: Names) -> Figure | None:
    """Whether the token alone decides the experts: overlap at its occurrences, and of unrelated tokens."""
    groups = roles(seen)
    if not groups:
        return None
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    for index, role in enumerate(groups):
        of = {(router.name.stage, router.name.member): router.overlap for router in groups[role]}
        places = [place for place, step in enumerate(seen.steps) if (step.stage, step.member) in of]
        steps = [seen.steps[place] for place in places]
        same = [of[step.stage, step.member].same_token[step.repeat] for step in steps]
        other = [of[step.stage, step.member].unrelated[step.repeat, step.repeat] for step in steps]
        shade, style = colour(index, len(groups)), LINES[index % len(LINES)]
        axes.plot(places, same, style, color=shade, label=f"{names.role(role)}: same token")
        axes.plot(
            places, other, style.replace("-", ":"), color=shade, label=f"{names.role(role)}: unrelated tokens"
        )
    axes.set(xlabel="application, in running order", ylabel="intersection / union")
    axes.set_ylim(0, 1.03)
    application_axis(axes, [names.application(step) for step in seen.steps])
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=min(2, len(groups)), fontsize=8.5)
    return figure


def draw_diversity(seen: Figures, names: Names) -> Figure | None:
    """How many different tokens each expert works for, against how often it is used."""
    groups = roles(seen)
    if not groups:
        return None
    figure = new_figure(3.8)
    panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
    for (role, routers), axes in zip(groups.items(), panels, strict=True):
        for index, router in enumerate(routers):
            used = [expert for expert in router.diversity.experts if expert.uses]
            even = sum(expert.uses for expert in used) / (router.n_heads * router.n_experts)
            axes.scatter(
                [expert.uses / even for expert in used],
                [expert.effective for expert in used],
                s=12,
                alpha=0.7,
                color=colour(index, len(routers)),
                linewidths=0,
                label=names.member(router.name.stage, router.name.member),
            )
        whole = np.mean([router.diversity.effective for router in routers])
        axes.axhline(whole, color=INK, ls="--", lw=1)
        axes.set(title=names.role(role), xlabel="uses relative to an even share")
        if whole > 0:  # otherwise no expert was ever used
            axes.set(xscale="log", yscale="log")
            log_axis(axes.xaxis)
            log_axis(axes.yaxis)
        axes.grid(alpha=0.12)
    panels[0].set_ylabel("effective number of different tokens")
    handles, labels = panels[-1].get_legend_handles_labels()
    if 1 < len(labels) <= len(COLOURS):
        labels = [f"member {label}" for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=4, markerscale=1.6)
    return figure


def draw_co_occurrence(seen: Figures, names: Names) -> Figure | None:
    """Which experts are chosen together, for routers that choose several of one set."""
    routers = [router for router in seen.routers if router.has_teams]
    if not routers:
        return None
    groups = some(routers)
    n_columns = min(2, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = new_figure(3.4 * n_rows)
    grid = np.atleast_1d(figure.subplots(n_rows, n_columns, squeeze=False)).flatten()
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for router, axes in zip(groups, grid, strict=False):
        order = router.pairs.order()
        lift = router.pairs.lift[0][np.ix_(order, order)]
        mesh = heat_map(axes, lift.clip(1 / 8, 8), norm=LogNorm(1 / 8, 8), colours=DIVERGING)
        member = names.member(router.name.stage, router.name.member)
        axes.set_title(f"{member}: {names.role(router.name.role)}")
        axes.set(xlabel="experts, neighbours alike")
        axes.set_aspect("equal")
    bar = figure.colorbar(mesh, ax=list(grid), label="together, relative to independent choices", shrink=0.8)
    bar.ax.minorticks_off()
    bar.set_ticks([1 / 8, 1 / 2, 1, 2, 8], labels=["≤1/8", "1/2", "1", "2", "≥8"])
    return figure
