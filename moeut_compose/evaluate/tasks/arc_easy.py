"""ARC-Easy: school questions on science (Clark et al., arXiv:1803.05457), test split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks.files import Record, read_file, read_jsonl
from moeut_compose.evaluate.tasks.items import Choice

if TYPE_CHECKING:
    from pathlib import Path

FILES = (
    "arc_easy_test.jsonl",
    "ARC-Easy/ARC-Easy-Test.jsonl",
    "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl",
    "ARC-V1-Feb2018.zip/ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl",
)
N_OPTIONS = 4
"""The published protocol leaves out questions with more or fewer."""


def read(folder: Path) -> list[Choice]:
    """All questions. Raises `DataError`."""
    return [_choice(record) for record in read_jsonl(read_file(folder, FILES))]


def read_published(folder: Path) -> list[Choice]:
    """The questions with exactly four options. Raises `DataError`."""
    return [choice for choice in read(folder) if len(choice.options) == N_OPTIONS]


def _choice(record: Record) -> Choice:
    question = Record(record.get("question", dict), f"{record.where}, question")
    choices = question.records("choices")
    labels = [choice.get("label", str) for choice in choices]
    if len(set(labels)) < len(labels):
        raise DataError(f"{record.where}: a label occurs twice in {', '.join(labels)}")
    answer = record.get("answerKey", str)
    if answer not in labels:
        raise DataError(f"{record.where}: the answer {answer!r} is not one of {', '.join(labels)}")
    return Choice(
        context=f"Question: {question.get('stem', str)}\nAnswer:",
        options=tuple(choice.get("text", str) for choice in choices),
        answer=labels.index(answer),
    )
