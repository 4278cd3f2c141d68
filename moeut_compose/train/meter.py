"""What is measured between two rows of the metrics: means over the steps taken, router loads, speed, memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moeut_compose.measure.hardware import model_flops_utilisation
from moeut_compose.train.device import used_memory
from moeut_compose.train.load_table import BY_REPEAT
from moeut_compose.train.metrics import RunningMeans, StepClock
from moeut_compose.train.router_load import RouterLoads

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from moeut_compose.train.loop import Trainer
    from moeut_compose.train.metrics import Row
    from moeut_compose.train.plan import TrainingPlan


class Meter:
    """Follows a trainer from row to row."""

    def __init__(
        self, trainer: Trainer, plan: TrainingPlan, peak: float | None, take_waited: Callable[[], float]
    ) -> None:
        """What is followed.

        `peak`: TFLOP/s of the device, if known; without it there is no utilisation. `take_waited` tells the seconds
        that the loop has waited for batches since it was last asked.
        """
        self._take_waited = take_waited
        self._trainer = trainer
        self._plan = plan
        self._peak = peak
        self._means = RunningMeans()
        self._loads = RouterLoads(trainer.device)
        self._clock = StepClock(trainer.device)
        self._last: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Count a step by what `Trainer.train_step` returned."""
        self._last = values
        self._clock.count(self._plan.tokens_per_step)
        means = {name: value for name, value in values.items() if name not in ("grad_norm", "skipped")}
        self._means.add(means, values["skipped"])
        self._loads.add(self._trainer.seen, values["skipped"])

    def row(self) -> Row:
        """The row of the steps since the last one; its event is `skipped` if none of them was taken."""
        step, means = self._trainer.step, self._means.means()
        grad_norm = self._last["grad_norm"].item()
        speed = self._clock.tokens_per_second()
        row = {
            "event": "train" if means else "skipped",
            "step": step,
            "tokens": step * self._plan.tokens_per_step,
            **means,
            "lr": self._trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped_steps": self._trainer.skips.read().total,
            "tokens_per_second": speed,
            "mfu": model_flops_utilisation(self._plan.macs_per_token, speed, self._peak),
            "data_wait": self._clock.share(self._take_waited()),
            "memory_bytes": used_memory(self._trainer.device),
            **(self._loads.columns() if means else {}),
        }
        by_repeat = self._loads.by_repeat() if means else {}
        if by_repeat:
            row[BY_REPEAT] = by_repeat
        self._means.clear()
        self._loads.clear()
        self._clock.reset()
        return row

    def detail(self, row: Row) -> str:
        """A row for the progress line."""
        return self._detail(row.get("cross_entropy"), row["tokens_per_second"])

    def glance(self) -> str:
        """The last step for the progress line; waits for the device."""
        return self._detail(self._last["cross_entropy"].item(), self._clock.tokens_per_second())

    def _detail(self, loss: float | None, speed: float) -> str:
        shown = "skipped" if loss is None or not math.isfinite(loss) else f"loss {loss:.3f}"
        used = model_flops_utilisation(self._plan.macs_per_token, speed, self._peak)
        share = "n/a" if used is None else f"{used:.1%}"
        return f"{shown}  {_short(speed)} tokens/s  MFU {share}"

    def start(self) -> None:
        """Time begins to count."""
        self._clock.reset()

    def paused(self) -> AbstractContextManager[None]:
        """Time inside does not count."""
        return self._clock.paused()

    def state_dict(self) -> dict[str, Any]:
        return self._means.state_dict() | {"loads": self._loads.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state)
        self._loads.load_state_dict(state.get("loads", {}))


def _short(number: float) -> str:
    """1234 as 1.2k."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"
