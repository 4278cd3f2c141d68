"""Router load by repeat as a table: `router_load.csv`, a line for each router and repeat of each row of the metrics.

Columns of `metrics.csv` would be hundreds. The lines say what the rows of `metrics.jsonl` say, so a resumed run writes
them anew.
"""

from __future__ import annotations

import csv
import io
import os
from typing import TYPE_CHECKING

from moeut_compose.data.files import write_atomically
from moeut_compose.train.router_load import FIGURES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TextIO

    from moeut_compose.train.metrics import Row

BY_REPEAT = "load_by_repeat"
"""The key of a row that holds router loads by repeat."""
ROUTER_LOAD = "router_load.csv"


class LoadTable:
    """A board that there is no file of unless a row tells of repeats."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        """Write the file of a run folder anew from the rows that it has."""
        self._path = folder / ROUTER_LOAD
        self._file: TextIO | None = None
        text = "".join(_lines(row) for row in rows)
        if text:
            self._open(text)
        else:
            self._path.unlink(missing_ok=True)

    def append(self, row: Row) -> None:
        text = _lines(row)
        if text and self._file is None:
            self._open(text)
        elif self._file is not None:
            self._file.write(text)
            self._file.flush()

    def flush(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, text: str) -> None:
        header = ",".join(("step", "tokens", "router", "repeat", *FIGURES))
        write_atomically(self._path, f"{header}\n{text}".encode())
        self._file = self._path.open("a", encoding="utf-8", newline="")


def by_router_and_repeat(row: Row) -> Iterator[tuple[str, int, dict[str, float | None]]]:
    """Router, repeat from 0, and the figures of a row that tells of repeats; nothing where they are damaged."""
    loads = row.get(BY_REPEAT)
    if not isinstance(loads, dict) or not all(map(_is_whole, loads.values())):
        return
    for router, by_figure in loads.items():
        for repeat, figures in enumerate(zip(*(by_figure[name] for name in FIGURES), strict=True)):
            yield router, repeat, dict(zip(FIGURES, figures, strict=True))


def _lines(row: Row) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for router, repeat, figures in by_router_and_repeat(row):
        writer.writerow((row["step"], row.get("tokens"), router, repeat, *figures.values()))
    return text.getvalue()


def _is_whole(by_figure: object) -> bool:
    """Whether there are equally many numbers, or None, of each figure."""
    if not isinstance(by_figure, dict):
        return False
    lists = [values for name in FIGURES if isinstance(values := by_figure.get(name), list)]
    if len(lists) < len(FIGURES) or len({len(values) for values in lists}) > 1:
        return False
    return all(value is None or type(value) in (int, float) for values in lists for value in values)
