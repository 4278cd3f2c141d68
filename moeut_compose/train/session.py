"""The main loop of a run: steps, metrics, evaluations, checkpoints, and the way out.

What is due after a step depends on the step number and on what is on disk alone. So a run that was stopped
anywhere does after resuming what it would have done without the stop.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any

import torch

from moeut_compose.data.order import windows_of_step
from moeut_compose.evaluate.perplexity import measure_perplexity
from moeut_compose.generate import generate
from moeut_compose.measure.hardware import peak_tflops
from moeut_compose.spec.recipe import PUBLISHED_SEPARATOR
from moeut_compose.train.device import choose_precision
from moeut_compose.train.divergence import stuck
from moeut_compose.train.errors import Interrupted
from moeut_compose.train.folder import PLOTS
from moeut_compose.train.loop import SEED_STRIDE, Trainer
from moeut_compose.train.meter import Meter
from moeut_compose.train.metrics import MetricsLog
from moeut_compose.train.modes import compile_layers
from moeut_compose.train.parallel import spread
from moeut_compose.train.plot import plot_loss
from moeut_compose.train.prefetch import Prefetcher
from moeut_compose.train.recompute import checkpoint_layers
from moeut_compose.train.result import TrainResult, columns_of, from_columns
from moeut_compose.train.saving import Saver
from moeut_compose.train.signals import StopRequested
from moeut_compose.train.spikes import spike
from moeut_compose.train.tensorboard import TensorBoardLog
from moeut_compose.train.weights_and_biases import WandbLog

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.prepare import PreparedData
    from moeut_compose.evaluate.perplexity import Perplexity
    from moeut_compose.progress import Reporter, Task
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.checkpoint import Checkpoint
    from moeut_compose.train.metrics import Board, Row
    from moeut_compose.train.plan import TrainingPlan
    from moeut_compose.train.signals import StopSignal
    from moeut_compose.train.skipping import Skips
    from moeut_compose.world import World


class Session:
    """One process working on one run."""

    def __init__(
        self,
        folder: Path,
        model: LanguageModel,
        recipe: RecipeSpec,
        plan: TrainingPlan,
        data: PreparedData,
        *,
        architecture: str,
        world: World,
        stop: StopSignal,
        reporter: Reporter,
    ) -> None:
        self._world = world
        self._folder = folder
        self._model = model
        self._recipe = recipe
        self._plan = plan
        self._data = data
        self._stop = stop
        self._reporter = reporter
        self._device = next(model.parameters()).device
        self._log: MetricsLog | None = None
        self._skips_reported = 0
        graphed = recipe.cuda_graph and self._device.type == "cuda"
        engine = spread(model, world, recipe.parallelism, graphed=graphed)
        self._trainer = Trainer(
            model,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            steps=plan.steps,
            clip_norm=recipe.clip_norm,
            precision=choose_precision(recipe.precision, self._device),
            micro_batch=plan.micro_batch,
            graphed=graphed,
            world=world,
            engine=engine,
        )
        peak = recipe.hardware.peak_tflops or peak_tflops(plan.device_name, plan.precision)
        self._batches = Prefetcher(self._batch_of, steps=plan.steps, pin=self._device.type == "cuda")
        self._meter = Meter(self._trainer, plan, peak and peak * world.size, self._batches.take_waited)
        self._saver = Saver(
            folder,
            self._trainer,
            self._meter,
            recipe.checkpoint,
            architecture=architecture,
            data_identity=data.identity,
            tokens_per_step=plan.tokens_per_step,
            world=world,
        )

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Take up a checkpoint, or start from fresh weights."""
        if checkpoint is None:
            torch.manual_seed(self._recipe.seed + SEED_STRIDE * self._world.rank)
            random.seed(self._recipe.seed)
        else:
            checkpoint.load_weights(self._model)
            state = checkpoint.load_state()
            with checkpoint.taken_up():
                self._take_up(state, checkpoint.step)
        checkpoint_layers(self._model, self._recipe.activation_checkpointing)
        if self._recipe.compile is True:
            compile_layers(self._model)
        step = self._trainer.step
        boards = self._boards(step) if self._world.is_main else []
        self._log = MetricsLog(self._folder, keep_until=step, boards=boards, writes=self._world.is_main)

    def _boards(self, step: int) -> list[Board]:
        logging = self._recipe.logging
        boards: list[Board] = []
        if logging.tensorboard:
            boards.append(TensorBoardLog(self._folder, first_step=step))
        if logging.wandb:
            config = {"architecture": self._plan.architecture, "recipe": self._recipe.model_dump(mode="json")}
            boards.append(WandbLog(self._folder, config=config))
        return boards

    def _take_up(self, state: dict[str, Any], step: int) -> None:
        """The state of a checkpoint, as `Saver` writes it."""
        self._trainer.load_state_dict(state["trainer"])
        if self._trainer.step != step:
            raise ValueError(f"step={self._trainer.step} must be that of the checkpoint, {step}")
        self._meter.load_state_dict(state["means"])
        self._skips_reported = self._trainer.skips.read().total
        micro_batch = state["micro_batch"]
        if type(micro_batch) is not int or micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be a count")
        if (
            self._recipe.batch.micro == "auto"
            and state["device"] == self._device.type
            and (state.get("world_size", 1) == self._world.size)
        ):
            self._trainer.micro_batch = micro_batch  # another split would round differently

    @property
    def log(self) -> MetricsLog:
        assert self._log is not None, "begin comes first"
        return self._log

    def close(self) -> None:
        self._batches.close()
        self._saver.close()
        if self._log is not None:
            self._log.close()

    def run(self) -> TrainResult:
        """Train to the end. Raises `Interrupted` after saving a checkpoint, or `TrainingDiverged` without."""
        trainer, start = self._trainer, time.monotonic()
        with self._stop.deferred():
            try:
                self._train()
                validation = self._evaluate()
            except StopRequested as request:
                self._stop.answered()
                self.log.flush()
                raise Interrupted(request.signum, checkpoint=self._saver.saved(self.log)) from request
            losses = [row["cross_entropy"] for row in self.log.rows if row["event"] == "train"]
            return TrainResult(
                folder=self._folder,
                checkpoint=self._saver.saved(self.log),
                step=trainer.step,
                tokens=trainer.step * self._plan.tokens_per_step,
                loss=losses[-1] if losses else math.nan,
                validation=validation,
                sample=self._write_sample(),
                plot=self._world.on_main(self._draw),
                seconds=time.monotonic() - start,
            )

    def _draw(self) -> Path:
        title = f"{self._plan.architecture}, {self._plan.recipe}"
        return plot_loss(self.log.rows, self._folder / PLOTS, title=title)

    def _train(self) -> None:
        """Take the steps that are left, and save the last."""
        trainer = self._trainer
        self._do_what_is_due()
        self._meter.start()
        with self._reporter.task("training", total=trainer.steps, done=trainer.step) as task:
            while trainer.step < trainer.steps:
                self._take_step(task)
                self._do_what_is_due()
        self._saver.saved(self.log)

    def _take_step(self, task: Task) -> None:
        trainer, recipe = self._trainer, self._recipe
        batch = self._batches(trainer.step)

        def between(share: float) -> None:
            task.advance(share)
            if self._world.size == 1:
                self._stop.poll()

        may_shrink = recipe.batch.micro == "auto" and self._world.size == 1
        values = trainer.fitting_step(batch, between=between, may_shrink=may_shrink, warn=self._reporter.warn)
        self._meter.add(values)
        is_last = trainer.step == trainer.steps
        self._stop_if_stuck(trainer.skips.read() if is_last else trainer.skips.glance())
        due = is_last or trainer.step % recipe.logging.interval == 0
        detail = ""
        if due:
            detail = self._meter.detail(self._write_row())
        elif self._device.type == "cpu":  # elsewhere reading the loss would make the device wait
            detail = self._meter.glance()
        task.advance(0, detail=detail)
        if self._world.size > 1:  # all processes have to stop after the same step
            self._stop.poll(self._world.largest_late(self._stop.signum or 0))

    def _windows_of(self, step: int) -> list[int]:
        recipe = self._recipe
        n_windows = self._data.train.n_windows(self._plan.context)
        return windows_of_step(step, recipe.batch.size, n_windows, recipe.seed, recipe.order)

    def _batch_of(self, step: int) -> Tensor:
        """This process' part of the windows of a step."""
        windows, size = self._windows_of(step), self._plan.process_batch
        own = windows[self._world.rank * size : (self._world.rank + 1) * size]
        return torch.from_numpy(self._data.train.windows(own, self._plan.context))

    def _do_what_is_due(self) -> None:
        """Save and evaluate, if this step asks for it and it is not done yet."""
        step, steps = self._trainer.step, self._trainer.steps
        every = self._recipe.checkpoint.interval
        if step and every and step % every == 0:
            self._saver.save(self.log)
        every = self._recipe.evaluation.interval
        if step and every and step % every == 0 and step < steps:
            self._evaluate()

    def _write_row(self) -> Row:
        row = self._meter.row()
        self.log.append(row)
        skipped = row["skipped_steps"] - self._skips_reported
        if skipped:
            self._reporter.warn(
                f"{skipped} of the steps up to step {row['step']:,} skipped: loss or gradient was not finite"
            )
        self._skips_reported = row["skipped_steps"]
        jump = spike(self.log.rows)
        if jump is not None:
            self._reporter.warn(jump)
        return row

    def _stop_if_stuck(self, skips: Skips) -> None:
        """Raises `TrainingDiverged` after as many skipped steps in a row as the recipe allows."""
        if skips.in_a_row >= self._recipe.max_skipped_steps:
            self.log.flush()
            culprit = self._trainer.find_nonfinite(self._batch_of(skips.first))
            raise stuck(self._folder, self._recipe, skips, culprit, self._windows_of(skips.first))

    def _evaluate(self) -> Perplexity:
        """Perplexity at this step, from the metrics if it is there already."""
        step = self._trainer.step
        for row in self.log.rows:
            if row["event"] == "validation" and row["step"] == step:
                return from_columns(row)
        context, windows = self._plan.context, self._recipe.evaluation.windows
        available = self._data.validation.n_windows(context)
        count = available if windows is None else min(windows, available)

        def between(n: int) -> None:
            task.advance(n)
            self._stop.poll(self._world.largest(self._stop.signum or 0))

        with self._meter.paused(), self._reporter.task("evaluating", total=count) as task:
            result = measure_perplexity(
                self._model,
                self._data.validation,
                context=context,
                windows=count,
                batch_size=self._trainer.micro_batch,
                between=between,
                world=self._world,
            )
        row = {"event": "validation", "step": step, "tokens": step * self._plan.tokens_per_step}
        self.log.append(row | columns_of(result))
        self.log.flush()
        self._reporter.note(f"step {step:,}: validation perplexity {result.perplexity:.2f}")
        return result

    def _write_sample(self) -> str:
        evaluation = self._recipe.evaluation
        # processes that hold parts of the weights have to take equally many steps, whatever each of them draws
        stop = PUBLISHED_SEPARATOR if self._world.size == 1 else None
        with torch.compiler.set_stance("force_eager"):  # each token has another shape: nothing to compile for
            text = generate(
                self._model,
                self._data.tokenizer,
                evaluation.prompt,
                max_new_tokens=evaluation.sample_tokens,
                top_k=50,
                seed=self._recipe.seed,
                stop=stop,
            )
        written, separator, _ = text.partition(PUBLISHED_SEPARATOR)
        return written.rstrip() if separator else written
