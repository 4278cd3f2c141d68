"""`train --dry-run`: what a run will be, in numbers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeut_compose.train.plan import TrainingPlan

_BARS = " ▁▂▃▄▅▆▇█"
_CURVE_ROWS = 4
_CURVE_COLUMNS = 48


def print_plan(plan: "TrainingPlan") -> None:
    """The plan on stdout, with the learning rate drawn over the steps."""
    from moeut_compose.progress import format_duration

    memory = plan.memory
    free = f" of {_gib(plan.free_memory)} free" if plan.free_memory is not None else ""
    parts = f"{plan.accumulation} x {plan.micro_batch}" if plan.accumulation > 1 else "all at once"
    mode = plan.activation_checkpointing
    how = "" if mode == "none" else f", with {mode} activation checkpointing"
    others = {"selective": plan.memory_selective, "full": plan.memory_checkpointed}
    rows = [
        ("architecture", plan.architecture),
        ("recipe", plan.recipe),
        ("device", f"{plan.device_name}, {plan.precision}"),
        ("parameters", f"{plan.params:,} ({plan.active_params:,} active per token)"),
        ("MACs per token", f"{plan.macs_per_token:,}"),
        ("batch", f"{plan.batch_size} sequences of {plan.context} tokens, {parts}"),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}"),
        ("memory", f"about {_gib(memory.total)}{free}{how}"),
        (
            "",
            f"weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, "
            f"optimiser {_gib(memory.optimizer)}, activations {_gib(memory.activations)}",
        ),
        *(
            (
                "",
                f"with {name} activation checkpointing about {_gib(other.total)}, "
                f"activations {_gib(other.activations)}",
            )
            for name, other in others.items()
            if name != mode
        ),
    ]
    if plan.seconds is not None:
        rows.append(("duration", f"about {format_duration(plan.seconds)}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print("\nlearning rate")
    for line in draw_curve(plan.lr_curve):
        print(f"  {line}")
    for note in plan.notes:
        print(f"\nnote: {note}")


def draw_curve(points: list[tuple[int, float]]) -> list[str]:
    """Bars over evenly spaced steps, with the largest and the last value and the first and the last step.

    `points` are steps in order, each with its value; between two of them the earlier one holds.
    """
    last_step = points[-1][0]
    values = [
        _value_at(points, last_step * column / (_CURVE_COLUMNS - 1)) for column in range(_CURVE_COLUMNS)
    ]
    peak_step, highest = max(points, key=lambda point: point[1])
    levels = [round(value / highest * 8 * _CURVE_ROWS) if highest else 0 for value in values]
    lines = [
        "".join(_BARS[min(max(level - 8 * row, 0), 8)] for level in levels)
        for row in reversed(range(_CURVE_ROWS))
    ]
    lines[0] += f"  peak {highest:.4g} at step {peak_step:,}"
    lines[-1] += f"  last {points[-1][1]:.4g}"
    end = f"step {last_step:,}"
    return [*lines, f"{points[0][0]:,}{end.rjust(_CURVE_COLUMNS - 1)}"]


def _value_at(points: list[tuple[int, float]], step: float) -> float:
    return next((value for at, value in reversed(points) if at <= step), points[0][1])


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
