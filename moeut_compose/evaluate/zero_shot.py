"""Zero-shot benchmarks of a trained run.

The result of each finished benchmark is kept in the run folder, as `evaluation/<task>.json`, and used again as
long as checkpoint, items, tokenizer and rules are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import write_atomically
from moeut_compose.evaluate.protocols import rules
from moeut_compose.evaluate.scoring import score_passages
from moeut_compose.evaluate.tasks import TASKS, Task
from moeut_compose.progress import SilentReporter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from moeut_compose.evaluate.protocols import ProtocolName, Verdict
    from moeut_compose.evaluate.tasks.items import Item
    from moeut_compose.progress import Reporter
    from moeut_compose.train.run import Run

FOLDER = "evaluation"
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


def evaluate_tasks(
    run: Run,
    tasks: Sequence[str],
    folder: Path,
    *,
    protocol: ProtocolName = "published",
    limit: int | None = None,
    max_tokens: int = 8192,
    anew: bool = False,
    reporter: Reporter | None = None,
) -> list[TaskResult]:
    """Run benchmarks, whose files lie in `folder`, on a run.

    `limit`: the first items only, of each group where there are groups. `max_tokens` of a batch change no
    result. `anew` ignores results that are kept. Raises `DataError`, before any work, if files are missing,
    and `ValueError` for an unknown task or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is not one of {', '.join(TASKS)}")
    reporter = reporter or SilentReporter()
    items = {task: read_items(TASKS[task], folder, protocol, limit) for task in tasks}
    return [
        _evaluate_task(run, task, items[task], protocol, limit, max_tokens, anew, reporter) for task in items
    ]


def read_items(task: Task, folder: Path, protocol: ProtocolName, limit: int | None = None) -> list[Item]:
    """The items of a benchmark in a protocol. Raises `DataError`."""
    read = task.read_published if protocol == "published" else task.read_harness
    if read is None:
        raise DataError(f"{task.name} has no rules in the harness protocol; leave it out or use `published`")
    items = list(read(folder))
    if not items:
        raise DataError(f"{folder}: the files of {task.name} hold no items")
    if limit is None:
        return items
    seen: dict[str, int] = defaultdict(int)
    first: list[Item] = []
    for item in items:
        if seen[item.group] < limit:
            first.append(item)
        seen[item.group] += 1
    return first


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


def _evaluate_task(
    run: Run,
    task: str,
    items: Sequence[Item],
    protocol: ProtocolName,
    limit: int | None,
    max_tokens: int,
    anew: bool,
    reporter: Reporter,
) -> TaskResult:
    identity = Identity(task, protocol, run.step, limit, fingerprint(items), run.tokenizer.fingerprint)
    path = result_path(run.path, identity)
    kept = None if anew else _read_result(path, identity)
    if kept is not None:
        reporter.note(f"{TASKS[task].title}: taken from {path}")
        return kept
    start = time.monotonic()
    protocol_rules = rules(protocol, run.tokenizer, context_length=run.context)
    passages = [protocol_rules.passages(item) for item in items]
    flat = [passage for of_item in passages for passage in of_item]
    with reporter.task(TASKS[task].title, total=len(flat)) as progress:
        scores = iter(score_passages(run.model, flat, max_tokens=max_tokens, between=progress.advance))
    verdicts = [
        protocol_rules.judge(item, of_item, [next(scores) for _ in of_item])
        for item, of_item in zip(items, passages, strict=True)
    ]
    result = summarize(identity, items, verdicts, seconds=time.monotonic() - start)
    _keep(path, result, reporter)
    return result


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


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item)).encode() + b"\n")
    return digest.hexdigest()


def result_path(run: Path, identity: Identity) -> Path:
    """Where a result is kept: a quick look at a few items does not replace the whole."""
    name = identity.task
    if identity.protocol != "published":
        name += f"-{identity.protocol}"
    if identity.limit is not None:
        name += f"-limit-{identity.limit}"
    return run / FOLDER / f"{name}.json"


def _read_result(path: Path, identity: Identity) -> TaskResult | None:
    """The result that is kept, if it is one for this identity."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = Identity(**{name: content.pop(name) for name in asdict(identity)})
        low, high = content.pop("confidence_interval")
        result = TaskResult(identity=stored, confidence_interval=(low, high), **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return result if stored == identity else None


def _keep(path: Path, result: TaskResult, reporter: Reporter) -> None:
    """Write a result; a run folder that cannot be written to is no reason to lose it."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, f"{json.dumps(result.to_dict(), indent=1)}\n".encode())
    except OSError as error:
        reporter.warn(f"cannot keep the result in {path}: {error.strerror or error}")
