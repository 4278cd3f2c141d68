"""Accuracy on the synthetic task of a run, by difficulty: those of training, and harder ones that it never saw.

The answer at the last place of an example counts. A model with shared depth may be run with another number of passes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moeut_compose.build import build_model
from moeut_compose.data.errors import DataError
from moeut_compose.data.synthetic import FIRST_SYMBOL, held_back_examples, pair
from moeut_compose.data.synthetic_tasks import synthetic_task
from moeut_compose.evaluate.task_result import wilson_interval
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.io import dump_yaml, parse_spec
from moeut_compose.spec.recipe import SyntheticData

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.synthetic_tasks import Example
    from moeut_compose.progress import Reporter
    from moeut_compose.train.run import Run


@dataclass(frozen=True)
class DifficultyResult:
    """How often a run was right at one difficulty."""

    difficulty: int
    is_trained: bool
    """Whether training saw this difficulty."""
    accuracy: float
    confidence_interval: tuple[float, float]
    """95 % Wilson interval."""
    shortcut: float
    """Accuracy of the best known shortcut on the same examples; at least chance."""
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"confidence_interval": list(self.confidence_interval)}


def evaluate_synthetic(
    run: Run,
    *,
    n_items: int = 1000,
    repeats: int | None = None,
    batch_size: int = 250,
    reporter: Reporter | None = None,
) -> list[DifficultyResult]:
    """Accuracy at every difficulty, on examples that depend on the recipe's seed alone and not on the run.

    `repeats` replaces the passes of every stage that makes more than one. Raises `DataError` if the run was not
    trained on a synthetic task, or the passes have weights of their own.
    """
    data = run.recipe.data
    if not isinstance(data, SyntheticData):
        raise DataError(f"{run.path} was trained on {data.kind} data, not on a synthetic task")
    task = synthetic_task(data.task, data.seed)
    model = run.model if repeats is None else with_repeats(run, repeats)
    trained, harder = task.difficulties
    results = []
    with (reporter or SilentReporter()).task(data.task.kind, total=len(trained) + len(harder)) as progress:
        for difficulty in (*trained, *harder):
            examples = held_back_examples(task, data.seed, difficulty, n_items)
            accuracy = float(np.mean(right_answers(model, examples, batch_size)))
            results.append(
                DifficultyResult(
                    difficulty=difficulty,
                    is_trained=difficulty in trained,
                    accuracy=accuracy,
                    confidence_interval=wilson_interval(accuracy, n_items),
                    shortcut=float(np.mean([task.chance(example) for example in examples])),
                    n=n_items,
                )
            )
            progress.advance()
    return results


def right_answers(model: LanguageModel, examples: Sequence[Example], batch_size: int) -> list[bool]:
    """Whether the likeliest token at the last place of each example is its answer."""
    device = next(model.parameters()).device
    right: list[bool] = []
    model.eval()
    with torch.no_grad():
        for first in range(0, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            longest = max(len(symbols) for symbols, _ in batch)
            windows = np.stack([pair(symbols, answers, longest) for symbols, answers in batch])
            logits = model(torch.from_numpy(windows[:, 0]).to(device)).logits
            best = logits.argmax(-1).cpu()
            for row, (symbols, answers) in zip(best, batch, strict=True):
                last = len(symbols) - 1
                right.append(int(row[last]) == answers[last] + FIRST_SYMBOL)
    return right


def with_repeats(run: Run, repeats: int) -> LanguageModel:
    """The model of a run with another number of passes over its shared stages. Raises `DataError`."""
    looped = [index for index, stage in enumerate(run.spec.stages) if stage.repeats > 1]
    if not looped:
        raise DataError(f"{run.spec.name} shares no depth: no stage makes more than one pass")
    spec = parse_spec(dump_yaml(run.spec), [f"stages.{index}.repeats={repeats}" for index in looped])
    if spec.num_params() != run.spec.num_params():
        raise DataError(f"{run.spec.name} has weights for each pass, so their number cannot change")
    model = build_model(spec, device=next(run.model.parameters()).device, init=False)
    model.load_state_dict(run.model.state_dict())
    return model.eval()
