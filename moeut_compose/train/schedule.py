"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

from moeut_compose.spec.recipe import ConstantSchedule, CosineSchedule

if TYPE_CHECKING:
    from moeut_compose.spec.recipe import ScheduleSpec


def lr_at(step: int, schedule: ScheduleSpec, base_lr: float, *, steps: int | None = None) -> float:
    """The rate that is set before 0-based step `step`.

    With W warm-up steps it is `base_lr * (step + 1) / W` before step W. From then on the published cosine is

        lr_min + (base_lr - lr_min) * (1 + cos(pi * u / S)) / 2
        with u = step - W and lr_min = min_lr_multiplier * base_lr

    Its period S is `schedule.period`, or else `steps`, the length of the whole run: not what the warm-up
    leaves of it, so the floor is not reached when there is one. Past the period the rate stays at the floor.

    Raises `ValueError` if a cosine has neither period nor `steps`.
    """
    if step < schedule.warmup_steps:
        return base_lr * (step + 1) / schedule.warmup_steps
    match schedule:
        case ConstantSchedule():
            return base_lr
        case CosineSchedule():
            period = schedule.period or steps
            if period is None:
                raise ValueError("a cosine schedule needs a period or the steps of the run")
            lowest = schedule.min_lr_multiplier * base_lr
            clock = min(step - schedule.warmup_steps, period)
            return lowest + (base_lr - lowest) * (1 + math.cos(math.pi * clock / period)) / 2
        case _:
            assert_never(schedule)
