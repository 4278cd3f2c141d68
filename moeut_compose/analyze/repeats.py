"""The loss of a trained model whose stages run fewer or more passes than in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeut_compose.blocks.stages import Stage
from moeut_compose.evaluate.perplexity import measure_perplexity
from moeut_compose.spec.stages import StageSpec, stage_schedule

if TYPE_CHECKING:
    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.tokens import TokenFile
    from moeut_compose.progress import Reporter
    from moeut_compose.spec.model import ModelSpec

MAX_FEWER = 10
"""Numbers of passes below the trained one that are tried."""


@dataclass(frozen=True)
class RepeatsPoint:
    """The loss at one number of passes, in nats per token."""

    repeats: int
    cross_entropy: float


@dataclass(frozen=True)
class RepeatsCurve:
    """One stage at several numbers of passes; the other stages run as trained."""

    stage: int
    trained: int
    limit: int | None
    """The most passes that the stage has weights for; None if any number can run."""
    points: tuple[RepeatsPoint, ...]


def most_repeats(stage: StageSpec) -> int | None:
    """The most passes that a stage can run: it may have weights for each pass. None if there is no bound."""
    own = stage.norms == "per_repeat" or stage.lora is not None or stage.step.kind == "learned"
    return stage.repeats if own else None


def repeats_to_try(trained: int, limit: int | None) -> list[int]:
    """1 to the trained number, thinned out where that is many; then up to twice as many where the stage can."""
    step = -(-(trained - 1) // MAX_FEWER) if trained > 1 else 1
    fewer = range(trained, 0, -step)
    more = {trained + 1, trained + -(-trained // 4), trained + -(-trained // 2), 2 * trained}
    wanted = {1, *fewer, *more}
    return sorted(number for number in wanted if limit is None or number <= limit)


@contextmanager
def running_repeats(model: LanguageModel, spec: ModelSpec, stage: int, repeats: int) -> Iterator[None]:
    """Let one stage of a model run `repeats` passes, in the pattern of its spec.

    Raises `ValueError` for fewer than one pass, or more than the stage has weights for.
    """
    described = spec.stages[stage]
    limit = most_repeats(described)
    if repeats < 1 or (limit is not None and repeats > limit):
        bound = "at least 1" if limit is None else f"between 1 and {limit}, which it has weights for"
        raise ValueError(f"stage {stage} cannot run repeats={repeats}; the number must be {bound}")
    module = model.stages[stage]
    assert isinstance(module, Stage)
    before = module.schedule
    module.schedule = tuple(stage_schedule(described.n_members, repeats, described.pattern))
    try:
        yield
    finally:
        module.schedule = before


def loss_by_repeats(
    model: LanguageModel,
    spec: ModelSpec,
    text: TokenFile,
    *,
    context: int,
    windows: int,
    batch_size: int,
    reporter: Reporter,
) -> list[RepeatsCurve]:
    """A curve for each stage that repeats. Its halting rule, if it has one, decides after the passes there are."""
    curves = []
    for index, stage in enumerate(spec.stages):
        if stage.repeats == 1:
            continue
        limit = most_repeats(stage)
        numbers = repeats_to_try(stage.repeats, limit)
        points = []
        with reporter.task(f"stage {index} by passes", total=sum(numbers) * windows) as task:
            for number in numbers:
                with running_repeats(model, spec, index, number):
                    result = measure_perplexity(
                        model,
                        text,
                        context=context,
                        windows=windows,
                        batch_size=batch_size,
                        between=lambda n, number=number: task.advance(n * number),  # type: ignore[misc]
                    )
                points.append(RepeatsPoint(number, result.cross_entropy))
        curves.append(RepeatsCurve(index, stage.repeats, limit, tuple(points)))
    return curves
