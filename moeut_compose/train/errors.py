"""How training can end before its last step; each knows the exit code that stands for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class TrainError(Exception):
    """Training cannot start or go on; the message says why and what helps."""

    exit_code = 1
    is_shared = False
    """Whether every process of a run fails with it, so that one of them is enough to say so."""


class RunError(TrainError):
    """A run folder cannot be used as asked."""


class RunNotFound(RunError):
    """There is no run where one is named."""

    exit_code = 2


class CheckpointError(TrainError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class TrainingDiverged(TrainError):
    """Loss or gradients stopped being numbers."""

    is_shared = True


class OtherProcessFailed(TrainError):
    """Another process of the run has failed, and said why."""

    is_shared = True


class Interrupted(TrainError):
    """A signal asked training to stop: exit code 130 for SIGINT, 143 for SIGTERM."""

    is_shared = True

    def __init__(self, signum: int, *, checkpoint: Path | None = None) -> None:
        self.exit_code = 128 + signum
        self.checkpoint = checkpoint
        saved = (
            f"saved {checkpoint}; resume with --resume {checkpoint.parent.parent}"
            if checkpoint
            else "no checkpoint was written"
        )
        super().__init__(f"stopped by a signal; {saved}")
