"""Pictures of a comparison: sizes side by side, size against cost, loss against cost and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeut_compose.measure.compare import Row

FORMATS = ("png", "svg", "pdf")


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Draw `rows` into `path` (PNG, SVG or PDF by its ending).

    Bars of parameters and multiply-accumulates, and one against the other; with trained runs, also loss
    against training cost and against time. Raises ValueError for another ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.removeprefix(".").lower() not in FORMATS:
        raise ValueError(f"{path.name} must end in one of {', '.join('.' + ending for ending in FORMATS)}")
    trained = [row for row in rows if row.history]
    height = max(2.6, 0.32 * len(rows) + 1.6)
    figure = Figure(figsize=(11, height + (3.8 if trained else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    if trained:
        upper, lower = figure.subfigures(2, 1, height_ratios=(height, 3.8))  # type: ignore[misc]
        _draw_losses(lower.subplots(1, 2, sharey=True), trained)
    else:
        upper = figure
    _draw_sizes(upper.subplots(1, 3, width_ratios=(1, 1, 1.35)), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_sizes(axes: Any, rows: Sequence[Row]) -> None:
    bars, costs, plane = axes
    names = [row.name for row in rows]
    colours = [f"C{index % 10}" for index in range(len(rows))]
    for panel, values, label in (
        (bars, [row.params / 1e6 for row in rows], "parameters (millions)"),
        (costs, [row.macs_per_token / 1e6 for row in rows], "MACs per token (millions)"),
    ):
        panel.barh(names, values, color=colours)
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    costs.set_yticklabels([])
    for row, colour in zip(rows, colours, strict=True):
        plane.scatter(row.macs_per_token / 1e6, row.params / 1e6, color=colour, label=row.name, s=36)
    plane.set(xlabel="MACs per token (millions)", ylabel="parameters (millions)")
    plane.set_xlim(0, 1.12 * max(row.macs_per_token for row in rows) / 1e6)
    plane.set_ylim(0, 1.12 * max(row.params for row in rows) / 1e6)
    plane.grid(alpha=0.3)
    plane.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    by_cost, by_time = axes
    for row in rows:
        losses = [point.loss for point in row.history]
        by_cost.plot([point.macs for point in row.history], losses, label=row.name, lw=1.3)
        by_time.plot([point.seconds / 60 for point in row.history], losses, label=row.name, lw=1.3)
    by_cost.set(xlabel="training MACs", ylabel="training cross entropy (nats per token)", xscale="log")
    by_time.set(xlabel="training time (minutes)")
    for panel in axes:
        panel.grid(alpha=0.3)
    by_time.legend(fontsize="small")
