"""Zero-shot benchmarks of a trained run.

The result of each finished benchmark is kept in the run folder, as `evaluation/<task>.json`, and used again as
long as checkpoint, items, tokenizer and rules are the same. What is done of an unfinished one lies beside it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import write_atomically
from moeut_compose.evaluate.partial import PartialResult
from moeut_compose.evaluate.protocols import rules
from moeut_compose.evaluate.scoring import score_passages
from moeut_compose.evaluate.task_result import Identity, TaskResult, summarize
from moeut_compose.evaluate.tasks import TASKS, Task
from moeut_compose.evaluate.tasks.hub import fetch_benchmarks
from moeut_compose.evaluate.tasks.items import LastWord
from moeut_compose.progress import SilentReporter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moeut_compose.evaluate.protocols import ProtocolName, Rules, Verdict
    from moeut_compose.evaluate.tasks.items import Item
    from moeut_compose.progress import Reporter
    from moeut_compose.progress import Task as ProgressTask
    from moeut_compose.train.run import Run

FOLDER = "evaluation"
ITEMS_AT_ONCE = 100
"""Items that are lost at most when a benchmark is interrupted."""


def evaluate_tasks(
    run: Run,
    tasks: Sequence[str],
    folder: Path | None,
    *,
    protocol: ProtocolName = "published",
    limit: int | None = None,
    max_tokens: int = 8192,
    anew: bool = False,
    reporter: Reporter | None = None,
) -> list[TaskResult]:
    """Run benchmarks, whose files lie in `folder` (none: on the Hugging Face hub), on a run.

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
    for task in tasks:
        reader_of(TASKS[task], protocol)
    folders = fetch_benchmarks(tasks, reporter=reporter) if folder is None else dict.fromkeys(tasks, folder)
    items = {task: read_items(TASKS[task], folders[task], protocol, limit) for task in tasks}
    return [
        _evaluate_task(run, task, items[task], protocol, limit, max_tokens, anew, reporter) for task in items
    ]


def reader_of(task: Task, protocol: ProtocolName) -> Callable[[Path], Sequence[Item]]:
    """What reads the items of a benchmark for a protocol. Raises `DataError` if the protocol has no rules for it."""
    read = task.read_published if protocol == "published" else task.read_harness
    if read is None:
        raise DataError(f"{task.name} has no rules in the harness protocol; leave it out or use `published`")
    return read


def read_items(task: Task, folder: Path, protocol: ProtocolName, limit: int | None = None) -> list[Item]:
    """The items of a benchmark in a protocol. Raises `DataError`."""
    items = list(reader_of(task, protocol)(folder))
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
    partial = PartialResult(path.with_suffix(".partial.jsonl"), asdict(identity))
    try:
        partial = PartialResult.begin(partial.path, partial.identity, anew=anew)
        keep = partial.add
    except OSError as error:
        reporter.warn(f"cannot keep results in {partial.path}: {error.strerror or error}")
        keep = partial.take
    protocol_rules = rules(protocol, run.tokenizer, context_length=run.context)
    left = [index for index in by_length(items) if index not in partial.verdicts]
    if partial.verdicts:
        reporter.note(
            f"{TASKS[task].title}: going on after {len(partial.verdicts):,} of {len(items):,} items"
        )
    with reporter.task(TASKS[task].title, total=len(items), done=len(items) - len(left)) as progress:
        for first in range(0, len(left), ITEMS_AT_ONCE):
            start = time.monotonic()
            indices = left[first : first + ITEMS_AT_ONCE]
            verdicts = _judge(run, protocol_rules, [items[index] for index in indices], max_tokens, progress)
            keep(dict(zip(indices, verdicts, strict=True)), time.monotonic() - start)
    verdicts = [partial.verdicts[index] for index in range(len(items))]
    result = summarize(identity, items, verdicts, seconds=partial.seconds)
    if _keep(path, result, reporter):
        partial.remove()
    return result


def by_length(items: Sequence[Item]) -> list[int]:
    """Indices of items, the longest first: neighbours fill a batch without padding, and memory runs out early."""

    def size(item: Item) -> int:
        if isinstance(item, LastWord):
            return len(item.text)
        return len(item.context) + max(map(len, item.options))

    return sorted(range(len(items)), key=lambda index: size(items[index]), reverse=True)


def _judge(
    run: Run, protocol_rules: Rules, items: Sequence[Item], max_tokens: int, progress: ProgressTask
) -> list[Verdict]:
    """Score some items together; progress counts items."""
    passages = [protocol_rules.passages(item) for item in items]
    flat = [passage for of_item in passages for passage in of_item]
    share = len(items) / max(1, len(flat))
    scores = iter(
        score_passages(run.model, flat, max_tokens=max_tokens, between=lambda n: progress.advance(n * share))
    )
    return [
        protocol_rules.judge(item, of_item, [next(scores) for _ in of_item])
        for item, of_item in zip(items, passages, strict=True)
    ]


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


def _keep(path: Path, result: TaskResult, reporter: Reporter) -> bool:
    """Write a result, if that is possible: a run folder that cannot be written to is no reason to lose it."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, f"{json.dumps(result.to_dict(), indent=1)}\n".encode())
    except OSError as error:
        reporter.warn(f"cannot keep the result in {path}: {error.strerror or error}")
        return False
    return True
