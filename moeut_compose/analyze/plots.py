"""All figures of an analysis, in the order of the report, and their files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib import rc_context

from moeut_compose.analyze import draw_depth as depth
from moeut_compose.analyze import draw_passes as passes
from moeut_compose.analyze import draw_routers as routers
from moeut_compose.analyze.draw import STYLE

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from moeut_compose.analyze.collect import Figures
    from moeut_compose.analyze.names import Names

PLOTS: dict[str, Callable[[Figures, Names], Figure | None]] = {
    "loss_by_repeats": depth.draw_loss_by_repeats,
    "residual": depth.draw_residual,
    "similarity": depth.draw_similarity,
    "load": routers.draw_load,
    "expert_depth": passes.draw_expert_depth,
    "sharpness": routers.draw_sharpness,
    "overlap": passes.draw_overlap,
    "token_or_context": routers.draw_token_or_context,
    "diversity": routers.draw_diversity,
    "co_occurrence": routers.draw_co_occurrence,
    "halting": depth.draw_halting,
    "halting_map": depth.draw_halting_map,
}


@dataclass(frozen=True)
class Plot:
    """A finished figure."""

    name: str
    png: bytes
    svg: str

    def write(self, folder: Path) -> dict[str, str]:
        """Write both files; returns their names."""
        (folder / f"{self.name}.png").write_bytes(self.png)
        (folder / f"{self.name}.svg").write_text(self.svg, encoding="utf-8")
        return {"name": self.name, "png": f"{self.name}.png", "svg": f"{self.name}.svg"}


def draw_plots(seen: Figures, names: Names) -> list[Plot]:
    """Every figure that the model has something for."""
    plots = []
    for name, draw in PLOTS.items():
        with rc_context({**STYLE, "svg.hashsalt": name}):
            figure = draw(seen, names)
            if figure is not None:
                plots.append(Plot(name, _png(figure), _svg(figure)))
    return plots


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # what the first drawing arranged stays for the next
    return file.getvalue()


def _svg(figure: Figure) -> str:
    """The same figure for any background; cells drawn as pixels get 200 of them to the inch."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", dpi=200, transparent=True, metadata={"Date": None})
    return file.getvalue().decode()
