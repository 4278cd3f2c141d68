"""Checkpoints of a session: what goes into one, and whether training waits for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from moeut_compose.train.background import BackgroundWriter, host_copy
from moeut_compose.train.checkpoint import prune_checkpoints, save_checkpoint, step_folder, weights_of
from moeut_compose.train.divergence import check_weights
from moeut_compose.train.parallel import collect

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moeut_compose.spec.recipe import CheckpointSpec
    from moeut_compose.train.loop import Trainer
    from moeut_compose.train.meter import Meter
    from moeut_compose.train.metrics import MetricsLog
    from moeut_compose.world import World


class Saver:
    """Saves what a trainer, a meter and the metrics stand at. All processes call it at the same steps."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        meter: Meter,
        recipe: CheckpointSpec,
        *,
        architecture: str,
        data_identity: str,
        tokens_per_step: int,
        world: World,
    ) -> None:
        self._folder = folder
        self._trainer = trainer
        self._meter = meter
        self._recipe = recipe
        self._architecture = architecture
        self._meta = {"data": data_identity}
        self._tokens_per_step = tokens_per_step
        self._world = world
        background = trainer.device.type == "cuda" if recipe.background == "auto" else recipe.background
        self._writer = BackgroundWriter() if background and world.is_main else None

    def save(self, log: MetricsLog) -> None:
        """Begin the checkpoint of this step, unless it is there; without a background writer it is there afterwards.

        Raises `CheckpointError`, also for the checkpoint before, or `TrainingDiverged`.
        """
        step = self._trainer.step
        if self._world.on_main(lambda: self._has(step)):
            return
        self._world.on_main(self._finish)
        with self._meter.paused():
            check_weights(self._folder, self._trainer.model, step, self._world)
            log.flush()
            weights = collect(weights_of(self._trainer.model), keep=self._world.is_main)
            state = {
                "trainer": self._trainer.state_dict(),
                "means": self._meter.state_dict(),
                "micro_batch": self._trainer.micro_batch,
                "device": self._trainer.device.type,
                "world_size": self._world.size,
            }
            self._world.on_main(lambda: self._start(step, weights, state))

    def saved(self, log: MetricsLog) -> Path:
        """The checkpoint of this step, whole and on disk."""
        self.save(log)
        with self._meter.paused() if self._writer else nullcontext():
            self._world.on_main(self._finish)
        return step_folder(self._folder, self._trainer.step)

    def close(self) -> None:
        """Let what was begun come to its end."""
        if self._writer is not None:
            self._writer.close()

    def _has(self, step: int) -> bool:
        being_written = self._writer is not None and self._writer.is_writing(step)
        return being_written or step_folder(self._folder, step).is_dir()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.finish()

    def _start(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if self._writer is None:
            self._write(step, weights, state)
            return
        weights, state = host_copy(weights), host_copy(state)
        self._writer.start(step, lambda: self._write(step, weights, state))

    def _write(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        save_checkpoint(
            self._folder,
            step=step,
            weights=weights,
            state=state,
            architecture=self._architecture,
            meta={"tokens": step * self._tokens_per_step, **self._meta},
        )
        prune_checkpoints(self._folder, self._recipe)
