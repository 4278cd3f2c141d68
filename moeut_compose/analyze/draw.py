"""What all figures share: colours that colour-blind readers tell apart, axes of applications, heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK = "#1f242b"
"""Text and lines of axes. The report replaces it by the colour of its own text."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6F6F6F")
"""After Okabe and Ito."""
SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"
WIDTH = 7.6
"""Inches of a figure over the whole page."""
MAX_VECTOR_CELLS = 200
"""Heat maps of more cells are drawn as pixels, also in vector formats."""
MAX_MEMBERS = 4
"""Members side by side in one figure."""
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "axes.unicode_minus": True,
}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of a size in inches, without a window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colour(index: int, n: int) -> Any:
    """The colour of one of `n` lines: apart where there are few, along a scale where there are many."""
    if n <= len(COLOURS):
        return COLOURS[index]
    return colormaps[SEQUENTIAL](index / (n - 1))


def application_axis(axes: Any, labels: Sequence[str]) -> None:
    """Name the applications on the x axis; where they are many, every second or third."""
    every = -(-len(labels) // 24)
    places = range(0, len(labels), every)
    axes.set_xticks(list(places), [labels[place] for place in places])
    if max(map(len, labels)) * len(labels) > 90:
        axes.tick_params(axis="x", labelrotation=60)
    axes.set_xlim(-0.5, len(labels) - 0.5)


def log_axis(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5, or evenly spaced where the range is short. Call it last."""
    low, high = axis.get_view_interval()
    if high / low < 12:
        axis.set_major_locator(
            FixedLocator([tick for tick in MaxNLocator(5).tick_values(low, high) if tick > 0])
        )
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def heat_map(
    axes: Any,
    values: np.ndarray,
    *,
    norm: Normalize,
    colours: str = SEQUENTIAL,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    numbers: bool = False,
) -> Any:
    """Cells `[rows, columns]` with the first row on top; missing ones stay grey."""
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        norm=norm,
        cmap=colormaps[colours].with_extremes(bad="#9a9a9a55"),
        rasterized=values.size > MAX_VECTOR_CELLS,
        edgecolors="none",
    )
    axes.invert_yaxis()
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    for names, set_ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        every = -(-len(names) // 30) or 1
        places = range(0, len(names), every)
        set_ticks([place + 0.5 for place in places], [names[place] for place in places])
    if columns and sum(map(len, columns)) > 24:
        axes.tick_params(axis="x", labelrotation=90)
    if numbers:
        _write_numbers(axes, values, mesh)
    return mesh


def _write_numbers(axes: Any, values: np.ndarray, mesh: Any) -> None:
    """Each value in its cell, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            text = f"{value:.2f}".replace("0.", ".", 1)
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="#000000" if is_light else "#ffffff",
            )


def some(items: Sequence[Any], most: int = MAX_MEMBERS) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
