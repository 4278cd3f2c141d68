"""What can be wrong with a spec, and where: one line for each problem."""

from collections.abc import Sequence
from dataclasses import dataclass

COMMAND_LINE = "<command line>"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written. Lines and columns count from 1; 0 means that there is none to name."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in one spec. `path` is dotted (`stages.0.repeats`) and empty when the whole file is meant."""

    file: str
    line: int
    column: int
    path: str
    message: str

    @classmethod
    def at(cls, place: Place, path: str, message: str) -> "Problem":
        return cls(place.file, place.line, place.column, path, " ".join(message.split()))

    def __str__(self) -> str:
        place = str(Place(self.file, self.line, self.column))
        return ": ".join(part for part in (place, self.path, self.message) if part)


class SpecError(ValueError):
    """A spec that cannot be used, with every problem found in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))
