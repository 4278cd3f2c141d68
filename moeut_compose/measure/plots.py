"""Pictures of a comparison: sizes side by side, size against cost, loss against cost and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeut_compose.measure.compare import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
_MARKERS = "osD^vPX*"
"""One for every ten models, whose colours repeat."""
_BESIDE = {"fontsize": "small", "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
"""A legend next to its panel, where it hides nothing."""


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Draw `rows` into `path` (PNG, SVG or PDF by its ending).

    Bars of parameters and multiply-accumulates, and one against the other; with trained runs, also loss
    against training cost and against time. Raises ValueError for another ending.
    """
    if path.suffix.removeprefix(".").lower() not in FORMATS:
        raise ValueError(f"{path.name} must end in one of {', '.join('.' + ending for ending in FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_comparison(rows).savefig(path, dpi=150)


def draw_comparison(rows: Sequence[Row]) -> Figure:
    """What `plot_comparison` saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.history]
    height = max(2.6, 0.32 * len(rows) + 1.6)
    figure = Figure(figsize=(11, height + (3.8 if trained else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    if trained:
        upper, lower = figure.subfigures(2, 1, height_ratios=(height, 3.8))  # type: ignore[misc]
        _draw_losses(lower.subplots(1, 2, sharey=True), rows)
    else:
        upper = figure
    _draw_sizes(upper.subplots(1, 3, width_ratios=(1, 1, 1.35)), rows)
    return figure


def _draw_sizes(axes: Any, rows: Sequence[Row]) -> None:
    bars, costs, plane = axes
    places = range(len(rows))
    for panel, values, label in (
        (bars, [row.params / 1e6 for row in rows], "parameters (millions)"),
        (costs, [row.macs_per_token / 1e6 for row in rows], "MACs per token (millions)"),
    ):
        panel.barh(places, values, color=[_colour(place) for place in places])
        panel.set_yticks(places, [row.name for row in rows] if panel is bars else [])
        panel.invert_yaxis()
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    points = [(row.macs_per_token / 1e6, row.params / 1e6) for row in rows]
    for place, point in enumerate(points):
        marker = _MARKERS[place // 10 % len(_MARKERS)]
        size = 36 * (1 + 1.5 * points[place + 1 :].count(point))  # those drawn over it leave a ring
        plane.scatter(*point, color=_colour(place), label=rows[place].name, s=size, marker=marker)
    plane.set(xlabel="MACs per token (millions)", ylabel="parameters (millions)")
    plane.set_xlim(0, 1.12 * max(x for x, _ in points))
    plane.set_ylim(0, 1.12 * max(y for _, y in points))
    plane.grid(alpha=0.3)
    for handle in plane.legend(**_BESIDE).legend_handles:
        handle.set_sizes([36])


def _colour(place: int) -> str:
    return f"C{place % 10}"


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    by_cost, by_time = axes
    for place, row in enumerate(rows):
        if not row.history:
            continue
        losses = [point.loss for point in row.history]
        style = {
            "label": row.name,
            "color": _colour(place),
            "lw": 1.3,
            "ls": ("-", "--", ":", "-.")[place // 10 % 4],
        }
        by_cost.plot([point.macs for point in row.history], losses, **style)
        by_time.plot([point.seconds / 60 for point in row.history], losses, **style)
    by_cost.set(xlabel="training MACs", ylabel="training cross entropy (nats per token)", xscale="log")
    by_time.set(xlabel="training time (minutes)")
    for panel in axes:
        panel.grid(alpha=0.3)
    by_time.legend(**_BESIDE)
