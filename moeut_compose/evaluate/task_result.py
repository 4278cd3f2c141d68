"""The result of one benchmark: accuracy, its confidence interval, and its parts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeut_compose.evaluate.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moeut_compose.evaluate.protocols import Verdict
    from moeut_compose.evaluate.tasks.items import Item

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Identity:
    """What a result depends on besides the weights of a step."""

    task: str
    protocol: str
    step: int
    limit: int | None
    items: str
    """SHA-256 of the items."""
    tokenizer: str
    """SHA-256 of the tokenizer."""


@dataclass(frozen=True)
class TaskResult:
    """How often a run was right on one benchmark."""

    identity: Identity
    accuracy: float
    """Fraction of items; with groups, the unweighted mean over groups."""
    confidence_interval: tuple[float, float]
    """95 % Wilson interval of the accuracy for this number of items."""
    n: int
    groups: dict[str, dict[str, float]]
    """Accuracy and n of each paradigm or type; empty where there are none."""
    others: dict[str, float]
    """Further figures of the protocol, averaged over items."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        return {**content.pop("identity"), **content, "confidence_interval": list(self.confidence_interval)}


def summarize(
    identity: Identity, items: Sequence[Item], verdicts: Sequence[Verdict], *, seconds: float = 0.0
) -> TaskResult:
    """Accuracy, its interval and the parts from the verdict on every item."""
    by_group: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        by_group[item.group].append(float(verdict.is_correct))
        for name, value in verdict.others.items():
            others[name].append(value)
    accuracy = _mean(_mean(values) for values in by_group.values())
    means = {name: _mean(values) for name, values in others.items()}
    if "target_nats" in means:
        means["target_perplexity"] = math.exp(min(means.pop("target_nats"), 700.0))
    return TaskResult(
        identity=identity,
        accuracy=accuracy,
        confidence_interval=wilson_interval(accuracy, len(items)),
        n=len(items),
        groups={name: {"accuracy": _mean(v), "n": len(v)} for name, v in by_group.items() if name},
        others=means,
        seconds=seconds,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def average(results: Sequence[TaskResult]) -> float | None:
    """Unweighted mean accuracy, as published, or None where a benchmark is missing."""
    if {result.identity.task for result in results} != set(TASKS):
        return None
    return math.fsum(result.accuracy for result in results) / len(results)


def wilson_interval(accuracy: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson, 1927): also sound near 0 and 1."""
    shrink = 1 + z * z / n
    centre = (accuracy + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
