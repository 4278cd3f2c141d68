"""The part of a benchmark that is done, on disk: one line for each group of items, so that a killed run goes on.

The first line says what the verdicts are of; lines of anything else, or torn by a crash, are not used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeut_compose.data.files import write_atomically
from moeut_compose.evaluate.protocols import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass
class PartialResult:
    """Verdicts by index of their item, kept in a file as they come."""

    path: Path
    identity: dict[str, Any]
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    seconds: float = 0.0
    """Time that the verdicts took, over all starts."""

    @classmethod
    def begin(cls, path: Path, identity: dict[str, Any], *, anew: bool) -> PartialResult:
        """Take up a file if it belongs to `identity`. Raises `OSError` if it cannot be written."""
        partial = cls(path, identity)
        found = [] if anew else _read_lines(path)
        lines = [identity]
        if found and found[0] == identity:
            for line in found[1:]:
                if (said := _said(line)) is None:
                    break
                partial.take(*said)
                lines.append(line)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        return partial

    def add(self, verdicts: Mapping[int, Verdict], seconds: float) -> None:
        """Keep more verdicts; on disk when this returns. Raises `OSError`."""
        self.take(verdicts, seconds)
        line = {
            "verdicts": [[index, verdict.is_correct, verdict.others] for index, verdict in verdicts.items()],
            "seconds": seconds,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The result is whole and kept elsewhere."""
        self.path.unlink(missing_ok=True)

    def take(self, verdicts: Mapping[int, Verdict], seconds: float) -> None:
        """Count verdicts in, in memory alone."""
        self.verdicts |= verdicts
        self.seconds += seconds


def _read_lines(path: Path) -> list[Any]:
    """The lines up to the first that is torn."""
    lines: list[Any] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                lines.append(json.loads(text))
    except (OSError, ValueError):
        pass
    return lines


def _said(line: Any) -> tuple[dict[int, Verdict], float] | None:
    """Verdicts and seconds of a line; None for a line of anything else."""
    try:
        verdicts = {
            int(index): Verdict(bool(correct), {name: float(value) for name, value in others.items()})
            for index, correct, others in line["verdicts"]
        }
        return verdicts, float(line["seconds"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
