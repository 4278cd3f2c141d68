"""Metrics: running means and speed between rows, and the files that rows go to.

`metrics.jsonl` is the record and only ever appended to; `metrics.csv` is the same table, written anew from
it, and `router_load.csv` one of what its rows say of single repeats. A resumed run drops the rows after its
checkpoint, so the files are those of an uninterrupted run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from moeut_compose.data.files import write_atomically
from moeut_compose.train.load_table import BY_REPEAT, LoadTable, by_router_and_repeat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

Row = dict[str, Any]

_REACHED = ("cross_entropy", "perplexity", "bits_per_byte", "validation_tokens", "windows")
_FIGURES = {"train": ("tokens", "cross_entropy"), "validation": ("tokens", *_REACHED)}


class RunningMeans:
    """Means of named scalars of the steps taken since the last row, summed on the device so that no step waits."""

    def __init__(self) -> None:
        self._count: Tensor | int = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], skipped: Tensor) -> None:
        """Count one step, unless the boolean scalar `skipped` is set."""
        self._count = self._count + ~skipped
        for name, value in values.items():
            taken = torch.where(skipped, 0.0, value.detach().double())
            self._sums[name] = self._sums.get(name, 0.0) + taken

    def means(self) -> dict[str, float]:
        """Empty if no step was taken."""
        count = int(self._count)
        return {name: total.item() / count for name, total in self._sums.items()} if count else {}

    def clear(self) -> None:
        self._count = 0
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": int(self._count), "sums": {name: total.item() for name, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state["sums"].items()}


class StepClock:
    """Time and tokens since the last row of metrics, without evaluating and saving."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._began = time.perf_counter()
        self._paused = 0.0
        self._tokens = 0

    def count(self, n_tokens: int) -> None:
        self._tokens += n_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def tokens_per_second(self) -> float:
        """Meaningful once the device has been waited for, as reading any of its numbers does."""
        seconds = self._seconds()
        return self._tokens / seconds if seconds > 0 else 0.0

    def share(self, seconds: float) -> float:
        """What part of the time since the last row `seconds` are."""
        whole = self._seconds()
        return seconds / whole if whole > 0 else 0.0

    def _seconds(self) -> float:
        return time.perf_counter() - self._began - self._paused


class Board(Protocol):
    """Another place for the rows."""

    def append(self, row: Row) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """The metrics files of a run."""

    def __init__(
        self, folder: Path, *, keep_until: int, boards: Sequence[Board] = (), writes: bool = True
    ) -> None:
        """Open the files of a run folder, dropping rows of steps after `keep_until` and torn lines.

        New rows also go to `boards`. Without `writes` they are only remembered: another process writes the files.
        """
        self._boards = list(boards)
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        self.rows = [row for row in read_rows(self._jsonl) if row["step"] <= keep_until]
        self._file: TextIO | None = None
        if writes:
            write_atomically(self._jsonl, "".join(_line(row) for row in self.rows).encode())
            self._boards.append(LoadTable(folder, self.rows))
            self._file = self._jsonl.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a row, at once visible to readers of the file."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()
        for board in self._boards:
            board.append(row)

    def flush(self) -> None:
        """Force the rows to disk and bring the CSV file up to date."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        write_atomically(self._csv, as_csv(self.rows).encode())
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for board in self._boards:
            board.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last line torn by a crash, or any other that is no row, is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    """Whether it says what it is of, and has the figures that are read again."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("event"), str):
        return False
    return all(type(row.get(name)) in (int, float) for name in _FIGURES.get(row["event"], ()))


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row as `event/column`, and loads as `load_by_repeat/router.figure/repeat`.

    Text and missing values are left out.
    """
    values = {f"{row['event']}/{name}": value for name, value in row.items() if name not in ("event", "step")}
    for router, repeat, figures in by_router_and_repeat(row):
        values |= {f"{BY_REPEAT}/{router}.{name}/{repeat}": value for name, value in figures.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def as_csv(rows: list[Row]) -> str:
    """Rows as CSV; columns are all keys in order of first appearance, and cells of missing keys are empty.

    Loads by repeat have a table of their own.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key != BY_REPEAT))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
