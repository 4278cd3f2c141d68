"""Runs that cannot go on because numbers are none, and what a person has to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train.checkpoint import list_checkpoints
from moeut_compose.train.errors import TrainingDiverged
from moeut_compose.train.nonfinite import nonfinite_weight
from moeut_compose.train.skipping import Skips
from moeut_compose.world import World

_SHOWN_WINDOWS = 8


def stuck(
    run: Path, recipe: RecipeSpec, skips: Skips, culprit: str | None, windows: Sequence[int]
) -> TrainingDiverged:
    """Too many skipped steps in a row: `culprit` was not finite first, on the `windows` of the row's first step."""
    shown = ", ".join(map(str, windows[:_SHOWN_WINDOWS])) + (", …" if len(windows) > _SHOWN_WINDOWS else "")
    return TrainingDiverged(
        f"training diverged at step {skips.first + 1}: {skips.in_a_row} steps in a row were skipped because loss or "
        f"gradient was not finite; first non-finite: {culprit or 'nothing when the step was repeated'}; "
        f"its batch: windows {shown} of the training text (recipe.seed={recipe.seed}, "
        f"recipe.order={recipe.order}, 0-based step {skips.first}); {_way_back(run)}; "
        "try a lower optimizer.lr, a longer schedule.warmup_steps or a smaller clip_norm"
    )


def check_weights(run: Path, model: nn.Module, step: int, world: World) -> None:
    """Raises `TrainingDiverged` naming the first weight that is not finite on any process."""
    for name in filter(None, world.gather(nonfinite_weight(model))):
        raise TrainingDiverged(
            f"training diverged by step {step}: weight {name} is not finite; nothing is saved, {_way_back(run)}; "
            "try a lower optimizer.lr or a longer schedule.warmup_steps"
        )


def _way_back(run: Path) -> str:
    saved = list_checkpoints(run)
    if not saved:
        return "the same command with another --out repeats it"
    return f"--resume {run} repeats it from {saved[-1].name}"
