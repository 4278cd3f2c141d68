"""Figures of the depth of a model: losses by passes, the residual stream, cosines, halting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Normalize

from moeut_compose.analyze.draw import (
    COLOURS,
    DIVERGING,
    INK,
    SEQUENTIAL,
    application_axis,
    colour,
    heat_map,
    new_figure,
)
from moeut_compose.analyze.halting import N_BINS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moeut_compose.analyze.collect import Figures
    from moeut_compose.analyze.names import Names


def draw_loss_by_repeats(seen: Figures, names: Names) -> Figure | None:
    """Loss against passes; the trained number is marked."""
    if not seen.curves:
        return None
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    for index, curve in enumerate(seen.curves):
        shade = colour(index, len(seen.curves))
        label = f"stage {curve.stage}" if len(seen.curves) > 1 else "loss"
        numbers = [point.repeats for point in curve.points]
        axes.plot(numbers, [point.cross_entropy for point in curve.points], "o-", color=shade, label=label)
        axes.axvline(curve.trained, color=shade, ls="--", lw=1.2, label=f"as trained ({curve.trained})")
    axes.set(xlabel="passes over the stage at test time", ylabel="cross entropy (nats per token)")
    axes.set_xticks(sorted({point.repeats for curve in seen.curves for point in curve.points}))
    axes.grid(axis="y")
    axes.legend()
    return figure


def draw_residual(seen: Figures, names: Names) -> Figure | None:
    """Size of the stream, and of what each application adds."""
    labels = [names.application(step) for step in seen.steps]
    places = range(len(labels))
    figure = new_figure(5.2)
    size, update = figure.subplots(2, 1)
    size.plot(places, seen.residual.rms_after, "o-", color=COLOURS[0])
    size.set(ylabel="RMS of the stream after")
    size.set_ylim(0, 1.12 * np.nanmax(seen.residual.rms_after))
    for values, label, style, shade in (
        (seen.residual.update, "whole layer", "o-", COLOURS[0]),
        (seen.residual.mixer, "mixer", "s--", COLOURS[1]),
        (seen.residual.feedforward, "feedforward", "^:", COLOURS[2]),
    ):
        update.plot(places, values, style, color=shade, label=label)
    update.set(ylabel="size relative to the stream", xlabel="application, in running order")
    if _spread(seen.residual.update, seen.residual.mixer, seen.residual.feedforward) > 30:
        update.set_yscale("log")
    else:
        update.set_ylim(0)
    update.legend(ncols=3)
    for axes in (size, update):
        application_axis(axes, labels)
        axes.grid(axis="y")
    return figure


def draw_similarity(seen: Figures, names: Names) -> Figure | None:
    """Cosines between applications, of states and of updates."""
    labels = [names.application(step) for step in seen.steps]
    if len(labels) < 2:
        return None
    figure = new_figure(3.4)
    states, updates = figure.subplots(1, 2)
    lowest = np.floor(10 * np.nanmin(seen.similarity.states)) / 10
    for axes, values, colours, norm, title in (
        (
            states,
            seen.similarity.states,
            SEQUENTIAL,
            Normalize(min(lowest, 0.9), 1),
            "states after each application",
        ),
        (updates, seen.similarity.updates, DIVERGING, Normalize(-1, 1), "updates made by each application"),
    ):
        mesh = heat_map(
            axes,
            values,
            norm=norm,
            colours=colours,
            rows=labels,
            columns=labels,
            numbers=len(labels) <= 6,
        )
        axes.set_aspect("equal")
        axes.set_title(title)
        bar = figure.colorbar(mesh, ax=axes, label="mean cosine", shrink=0.75, pad=0.02)
        bar.outline.set_edgecolor(INK)
    return figure


def draw_halting(seen: Figures, names: Names) -> Figure | None:
    """How many tokens go how deep, and how hard they are."""
    if not seen.depths:
        return None
    figure = new_figure(3.4 * len(seen.depths))
    grid = np.atleast_2d(figure.subplots(len(seen.depths), 3))
    for (stage, depths), (mass, expected, loss) in zip(seen.depths.items(), grid, strict=True):
        n_repeats = len(depths.passes)
        passes = np.arange(1, n_repeats + 1)
        prefix = f"stage {stage}: " if len(seen.depths) > 1 else ""
        mass.bar(passes - 0.2, 100 * depths.mass, width=0.4, color=COLOURS[0], label="mass")
        runs = 100 * depths.passes[::-1].cumsum()[::-1] / max(depths.tokens, 1)
        mass.bar(passes + 0.2, runs, width=0.4, color=COLOURS[4], label="tokens")
        mass.set(xlabel="pass", ylabel="still running (%)", title=f"{prefix}going into each pass")
        mass.set_xticks(passes)
        mass.set_ylim(0, 118)
        mass.legend(ncols=2, loc="upper center")
        edges = np.linspace(1, n_repeats, N_BINS + 1)
        share = 100 * depths.expected / max(depths.tokens, 1)
        expected.stairs(share, edges, fill=True, color=COLOURS[0])
        expected.axvline(depths.mean, color=COLOURS[1], ls="--", label=f"mean {depths.mean:.2f}")
        expected.set(
            xlabel="expected passes of a token", ylabel="tokens (%)", title=f"{prefix}depth of tokens"
        )
        expected.margins(y=0.2)
        expected.legend()
        loss.plot((edges[1:] + edges[:-1]) / 2, depths.loss_expected, "o", color=COLOURS[2])
        loss.set(
            xlabel="expected passes of a token",
            ylabel="mean loss (nats)",
            title=f"{prefix}depth and difficulty",
        )
        for axes in (mass, expected, loss):
            axes.grid(axis="y")
        for axes in (expected, loss):
            axes.set_xlim(1, max(n_repeats, 2))
    return figure


def draw_halting_map(seen: Figures, names: Names) -> Figure | None:
    """Depth of each token of a few windows, in the order of the text."""
    if not seen.depths:
        return None
    rows = sum(len(depths.windows) for depths in seen.depths.values())
    figure = new_figure(1.3 * len(seen.depths) + 0.22 * rows)
    panels = np.atleast_1d(figure.subplots(len(seen.depths), 1))
    for (stage, depths), axes in zip(seen.depths.items(), panels, strict=True):
        labels = [str(number + 1) for number in range(len(depths.windows))]
        low, high = np.floor(depths.windows.min()), len(depths.passes)
        mesh = heat_map(axes, depths.windows, norm=Normalize(low, high), rows=labels)
        places = np.linspace(0, depths.windows.shape[1], 9).round().astype(int)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set(xlabel="position in the window (tokens)", ylabel="window")
        if len(seen.depths) > 1:
            axes.set_title(f"stage {stage}")
        figure.colorbar(mesh, ax=axes, label="expected passes", pad=0.01).outline.set_edgecolor(INK)
    return figure


def _spread(*values: np.ndarray) -> float:
    """Largest over smallest positive value."""
    joint = np.concatenate(values)
    positive = joint[joint > 0]
    return float(positive.max() / positive.min()) if len(positive) else 1.0
