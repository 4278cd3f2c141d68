"""What a run comes to, and evaluations as rows of its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeut_compose.evaluate.perplexity import Perplexity

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to."""

    folder: Path
    checkpoint: Path
    step: int
    tokens: int
    loss: float
    """Training cross entropy at the last row of the metrics."""
    validation: Perplexity
    sample: str
    plot: Path
    seconds: float


def columns_of(result: Perplexity) -> dict[str, Any]:
    """A result as columns of the metrics, where `tokens` already means those trained on."""
    columns = result.to_dict()
    return {"validation_tokens" if name == "tokens" else name: value for name, value in columns.items()}


def from_columns(row: dict[str, Any]) -> Perplexity:
    """The reverse of `columns_of`."""
    names = Perplexity.__dataclass_fields__
    return Perplexity(**{name: row["validation_tokens" if name == "tokens" else name] for name in names})
