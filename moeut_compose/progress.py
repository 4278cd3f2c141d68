"""Telling a person how long work takes: one protocol, a live bar on a terminal, plain lines elsewhere.

Everything goes to stderr, so that results on stdout stay machine-readable. Library code only ever sees
`Reporter`.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from rich.progress import Progress, TaskID


class Task(Protocol):
    """One piece of work with a known or unknown number of units."""

    def advance(self, n: float = 1, *, detail: str = "") -> None:
        """Count `n` more units as done; `detail` replaces the text beside the bar."""


class Reporter(Protocol):
    """Where messages and progress go."""

    def note(self, text: str) -> None:
        """Say something once."""

    def warn(self, text: str) -> None:
        """Say something that a user should act on."""

    def task(self, title: str, *, total: float | None, done: float = 0) -> AbstractContextManager[Task]:
        """Follow a piece of work from `done` of `total` units."""


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """A reporter for `stream` (default stderr): live bars on a terminal, otherwise plain lines."""
    stream = stream or sys.stderr
    return RichReporter(stream) if stream.isatty() else PlainReporter(stream)


class SilentReporter:
    """Says nothing."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    @contextmanager
    def task(self, title: str, *, total: float | None, done: float = 0) -> Iterator[Task]:
        yield _SilentTask()


class _SilentTask:
    def advance(self, n: float = 1, *, detail: str = "") -> None: ...


class PlainReporter:
    """One line at a time; a task speaks at most every `every` seconds, and less often the longer it takes."""

    def __init__(self, stream: TextIO, *, every: float = 10.0) -> None:
        self._stream = stream
        self._every = every

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    @contextmanager
    def task(self, title: str, *, total: float | None, done: float = 0) -> Iterator[Task]:
        task = _PlainTask(self, title, total, done, self._every)
        yield task
        task.finish()


class _PlainTask:
    def __init__(
        self, reporter: PlainReporter, title: str, total: float | None, done: float, every: float
    ) -> None:
        self._reporter = reporter
        self._title = title
        self._total = total
        self._done = self._first = done
        self._every = every
        self._start = self._spoke = time.monotonic()
        self._detail = ""

    def advance(self, n: float = 1, *, detail: str = "") -> None:
        self._done += n
        self._detail = detail or self._detail
        now = time.monotonic()
        if now - self._spoke >= max(self._every, (now - self._start) / 50):
            self._speak()

    def finish(self) -> None:
        elapsed = time.monotonic() - self._start
        detail = f"  {self._detail}" if self._detail else ""
        self._reporter.note(
            f"{self._title}: {format_amount(self._done, self._total)}{detail}  ({format_duration(elapsed)})"
        )

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        left = ""
        gained = self._done - self._first
        if self._total and gained > 0:
            seconds = (self._spoke - self._start) / gained * (self._total - self._done)
            left = f"  {format_duration(seconds)} left"
        detail = f"  {self._detail}" if self._detail else ""
        self._reporter.note(f"{self._title}: {format_amount(self._done, self._total)}{detail}{left}")


class RichReporter:
    """Live bars with the time left; messages scroll above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def task(self, title: str, *, total: float | None, done: float = 0) -> Iterator[Task]:
        if self._progress is not None:  # a task inside another gets a second line of the same display
            yield from self._line(self._progress, title, total, done)
            return
        self._progress = self._display()
        try:
            with self._progress:
                yield from self._line(self._progress, title, total, done)
        finally:
            self._progress = None

    @staticmethod
    def _line(progress: Progress, title: str, total: float | None, done: float) -> Iterator[Task]:
        amount = format_amount(done, total)
        identity = progress.add_task(title, total=total, amount=amount, detail="")
        progress.update(identity, completed=done)
        yield _RichTask(progress, identity, done, total)
        if len(progress.tasks) > 1:
            progress.remove_task(identity)

    def _display(self) -> Progress:
        from rich import progress

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[amount]}"),
            progress.TextColumn("{task.fields[detail]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )


class _RichTask:
    def __init__(self, progress: Progress, identity: TaskID, done: float, total: float | None) -> None:
        self._progress = progress
        self._identity = identity
        self._done = done
        self._total = total

    def advance(self, n: float = 1, *, detail: str = "") -> None:
        self._done += n
        fields: dict[str, Any] = {"detail": detail} if detail else {}
        amount = format_amount(self._done, self._total)
        self._progress.update(self._identity, completed=self._done, amount=amount, **fields)


def format_amount(done: float, total: float | None) -> str:
    """`12/500`, or `12` where the total is not known; parts of a unit are rounded."""
    return f"{done:,.0f}" + (f"/{total:,.0f}" if total else "")


def format_duration(seconds: float) -> str:
    """Two leading units: `45 s`, `3 min 20 s`, `2 h 5 min`, `15 days 3 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    for unit, size, smaller, small in (
        ("min", 60, "s", 1),
        ("h", 3600, "min", 60),
        ("days", 86400, "h", 3600),
    ):
        if seconds < size * (60 if unit == "min" else 24) or unit == "days":
            whole, rest = divmod(round(seconds), size)
            return f"{whole} {unit}" + (f" {rest // small} {smaller}" if rest // small else "")
    raise AssertionError("unreachable")
