"""HellaSwag: how a scene goes on (Zellers et al., arXiv:1905.07830), validation split."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks.files import Record, read_file, read_jsonl
from moeut_compose.evaluate.tasks.items import Choice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = ("hellaswag_val.jsonl", "hellaswag/hellaswag_val.jsonl")
_TAG = re.compile(r"\[.*?\]")


def read(folder: Path) -> list[Choice]:
    """All scenes, all `[...]` tags removed, as in lm-evaluation-harness. Raises `DataError`."""
    return _read(folder, clean)


def read_published(folder: Path) -> list[Choice]:
    """All scenes; of the tags only ` [title]` is replaced, `[header]` and `[step]` stay. Raises `DataError`."""
    return _read(folder, clean_published)


def clean(text: str) -> str:
    return _single_spaces(_TAG.sub("", _without_titles(text)))


def clean_published(text: str) -> str:
    return _single_spaces(_without_titles(text))


def _without_titles(text: str) -> str:
    return text.strip().replace(" [title]", ". ")


def _single_spaces(text: str) -> str:
    """Halve runs of spaces, once: three become two."""
    return text.replace("  ", " ")


def _read(folder: Path, clean_text: Callable[[str], str]) -> list[Choice]:
    return [_choice(record, clean_text) for record in read_jsonl(read_file(folder, FILES))]


def _choice(record: Record, clean_text: Callable[[str], str]) -> Choice:
    endings = record.get("endings", list)
    if not all(isinstance(ending, str) for ending in endings):
        raise DataError(f"{record.where}: expected endings that are texts, found {endings!r}")
    label = str(record.values.get("label"))
    if not label.isdecimal() or int(label) >= len(endings):
        raise DataError(
            f"{record.where}: expected a label from 0 to {len(endings) - 1}, "
            f"found {record.values.get('label')!r}"
        )
    scene = f"{record.get('ctx_a', str)} {record.get('ctx_b', str).capitalize()}"
    return Choice(
        context=clean_text(f"{record.get('activity_label', str)}: {scene}"),
        options=tuple(clean_text(ending) for ending in endings),
        answer=int(label),
    )
