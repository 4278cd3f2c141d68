"""The loss curve of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from moeut_compose.train.metrics import Row


def plot_loss(rows: list[Row], folder: Path, *, title: str) -> Path:
    """Draw training and validation loss against tokens into `loss.png` and `loss.svg`; return the PNG.

    Raises `ImportError` without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if row["event"] == "train"]
    validation = [row for row in rows if row["event"] == "validation"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [row["tokens"] for row in train], [row["cross_entropy"] for row in train], label="training", lw=1.2
    )
    axes.plot(
        [row["tokens"] for row in validation],
        [row["cross_entropy"] for row in validation],
        "o-",
        label="validation",
        ms=4,
    )
    axes.set(xlabel="training tokens", ylabel="cross entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "loss.png", dpi=150)
    figure.savefig(folder / "loss.svg")
    return folder / "loss.png"
