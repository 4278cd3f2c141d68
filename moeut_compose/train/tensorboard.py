"""The metrics of a run for TensorBoard: the same rows, in `tensorboard/` of the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.train.errors import TrainError
from moeut_compose.train.metrics import scalars

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

    from moeut_compose.train.metrics import Row

FOLDER = "tensorboard"


def summary_writer() -> type[SummaryWriter]:
    """The class that writes. Raises `TrainError` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(
            "recipe.logging.tensorboard=true needs TensorBoard, which is not installed: "
            "pip install 'moeut-compose[tensorboard]', or set recipe.logging.tensorboard=false"
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Writes the `scalars` of rows over the step."""

    def __init__(self, run: Path, *, first_step: int) -> None:
        """Points of steps after `first_step` that an earlier start wrote are hidden.

        Raises `TrainError` if TensorBoard is not installed.
        """
        self._writer = summary_writer()(str(run / FOLDER), purge_step=first_step + 1)

    def append(self, row: Row) -> None:
        """Add the numbers of a row; text and missing values have no curve."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
