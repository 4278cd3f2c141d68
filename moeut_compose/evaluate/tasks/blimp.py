"""BLiMP: a grammatical sentence against one that is not, in 67 paradigms (Warstadt et al., arXiv:1912.00582)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.evaluate.tasks.files import read_files, read_jsonl
from moeut_compose.evaluate.tasks.items import Choice

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("blimp.zip/data/*.jsonl", "blimp/data/*.jsonl", "blimp/*.jsonl")


def read(folder: Path) -> list[Choice]:
    """All pairs, the good sentence first; a file is a paradigm. Raises `DataError`."""
    return [
        Choice(
            context="",
            options=(record.get("sentence_good", str), record.get("sentence_bad", str)),
            answer=0,
            group=file.stem,
        )
        for file in read_files(folder, FILES)
        for record in read_jsonl(file)
    ]
