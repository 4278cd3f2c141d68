"""LAMBADA: the last word of a passage (Paperno et al., arXiv:1606.06031), in OpenAI's form of 5153 items."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks.files import Record, read_file, read_jsonl
from moeut_compose.evaluate.tasks.items import LastWord

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("lambada_test.jsonl", "lambada/lambada_test.jsonl")


def read(folder: Path) -> list[LastWord]:
    """All passages. Raises `DataError`."""
    return [_passage(record) for record in read_jsonl(read_file(folder, FILES))]


def _passage(record: Record) -> LastWord:
    item = LastWord(record.get("text", str))
    if not item.word:
        raise DataError(f"{record.where}: the passage ends with a space, where its last word should be")
    return item
