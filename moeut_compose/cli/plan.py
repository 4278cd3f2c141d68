"""`train --dry-run`: what a run will be, in numbers."""

from typing import TYPE_CHECKING

from moeut_compose.cli.output import print_table

if TYPE_CHECKING:
    from moeut_compose.train.plan import TrainingPlan

_BARS = " ▁▂▃▄▅▆▇█"
_CURVE_ROWS = 4


def print_plan(plan: "TrainingPlan") -> None:
    """The plan on stdout, with the learning rate drawn over the steps."""
    from moeut_compose.progress import format_duration

    memory = plan.memory
    free = f" of {_gib(plan.free_memory)} free" if plan.free_memory is not None else ""
    parts = f"{plan.accumulation} x {plan.micro_batch}" if plan.accumulation > 1 else "all at once"
    rows = [
        ("architecture", plan.architecture),
        ("recipe", plan.recipe),
        ("device", f"{plan.device_name}, {plan.precision}"),
        ("parameters", f"{plan.params:,} ({plan.active_params:,} active per token)"),
        ("MACs per token", f"{plan.macs_per_token:,}"),
        ("batch", f"{plan.batch_size} sequences of {plan.context} tokens, {parts}"),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,}"),
        ("memory", f"about {_gib(memory.total)}{free}"),
    ]
    if plan.seconds is not None:
        rows.append(("duration", f"about {format_duration(plan.seconds)}"))
    print_table(("", ""), rows, n_text_columns=2)
    print("\nlearning rate")
    for line in draw_curve(plan.lr_curve):
        print(f"  {line}")
    for note in plan.notes:
        print(f"\nnote: {note}")


def draw_curve(points: list[tuple[int, float]]) -> list[str]:
    """Bars, one for each point, with the largest and the smallest value and the first and the last step."""
    highest = max(value for _, value in points)
    levels = [round(value / highest * 8 * _CURVE_ROWS) if highest else 0 for _, value in points]
    lines = []
    for row in reversed(range(_CURVE_ROWS)):
        lines.append("".join(_BARS[min(max(level - 8 * row, 0), 8)] for level in levels))
    lines[0] += f"  peak {highest:.3g} at step {max(points, key=lambda point: point[1])[0]:,}"
    lines[-1] += f"  last {points[-1][1]:.4g}"
    first, last = f"{points[0][0]:,}", f"step {points[-1][0]:,}"
    return [*lines, first + last.rjust(len(points) - len(first))]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
