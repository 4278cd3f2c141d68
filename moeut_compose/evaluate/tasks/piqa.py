"""PIQA: the solution that works (Bisk et al., arXiv:1911.11641), validation split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks.files import BenchmarkFile, read_file, read_jsonl
from moeut_compose.evaluate.tasks.items import Choice

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("piqa/valid.jsonl", "physicaliqa-train-dev.zip/physicaliqa-train-dev/dev.jsonl")
LABELS = ("piqa/valid-labels.lst", "physicaliqa-train-dev.zip/physicaliqa-train-dev/dev-labels.lst")


def read(folder: Path) -> list[Choice]:
    """All goals with their two solutions. Raises `DataError`."""
    file, label_file = read_file(folder, FILES), read_file(folder, LABELS)
    records, labels = list(read_jsonl(file)), _labels(label_file)
    if len(records) != len(labels):
        raise DataError(
            f"{file.path} has {len(records)} items, and {label_file.path} has {len(labels)} labels"
        )
    return [
        Choice(
            context=f"Question: {record.get('goal', str)}\nAnswer:",
            options=(record.get("sol1", str), record.get("sol2", str)),
            answer=label,
        )
        for record, label in zip(records, labels, strict=True)
    ]


def _labels(file: BenchmarkFile) -> list[int]:
    labels = file.text.split()
    for number, label in enumerate(labels, 1):
        if label not in ("0", "1"):
            raise DataError(f"{file.path}, label {number}: expected 0 or 1, found {label!r}")
    return [int(label) for label in labels]
