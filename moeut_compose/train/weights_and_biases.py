"""The metrics of a run for Weights & Biases: the same rows, as one run that goes on when training goes on.

Account, project and whether anything is sent are what `wandb` reads from its own settings (`WANDB_PROJECT`,
`WANDB_MODE=offline`, …). Files lie in `wandb/` of the run folder.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from moeut_compose.train.errors import TrainError
from moeut_compose.train.metrics import scalars

if TYPE_CHECKING:
    from pathlib import Path

    from moeut_compose.train.metrics import Row


def import_wandb() -> Any:
    """The package. Raises `TrainError` if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise TrainError(
            "recipe.logging.wandb=true needs Weights & Biases, which is not installed: "
            "pip install 'moeut-compose[wandb]', or set recipe.logging.wandb=false"
        ) from error
    return wandb


class WandbLog:
    """Writes the `scalars` of rows over the step; a run folder is one run, however often it is resumed."""

    def __init__(self, run: Path, *, config: dict[str, Any]) -> None:
        """`config`: architecture and recipe. Raises `TrainError` if the package is missing or cannot begin."""
        wandb = import_wandb()
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(dir=str(run), id=identity, name=run.name, config=config, resume="allow")
        except wandb.errors.Error as error:
            raise TrainError(
                f"Weights & Biases cannot begin: {error}; WANDB_MODE=offline keeps the run on this machine"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def append(self, row: Row) -> None:
        """Add the numbers of a row; text and missing values have no curve."""
        self._run.log(scalars(row) | {"step": row["step"]})

    def flush(self) -> None:
        """Nothing to do: another process sends what it was given."""

    def close(self) -> None:
        self._run.finish()
