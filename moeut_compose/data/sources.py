"""Sources of text: documents of a training part and a held-out part, in a fixed order.

A source is opened from its description and read as often as needed. It holds no position: where reading
starts is decided by whoever tokenises, and what training sees is decided by `windows`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, assert_never

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import UNREADABLE, expand, hash_file, open_text
from moeut_compose.data.hub import HubSource
from moeut_compose.data.split import is_held_out
from moeut_compose.spec.recipe import BuiltinData, HuggingFaceData, JsonlData, TextData

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moeut_compose.spec.recipe import TextDataSpec

Part = Literal["train", "validation"]


class Source(Protocol):
    """Documents of two parts, in a fixed order."""

    is_remote: bool
    """Reading costs network traffic, so no more than needed is read."""

    def documents(self, part: Part) -> Iterator[str]:
        """Every document of a part, from the first."""

    def fingerprint(self, part: Part) -> str:
        """Changes whenever the documents of the part change."""


def open_source(spec: TextDataSpec) -> Source:
    """The source that a recipe describes. Raises `DataError` if it is not there."""
    match spec:
        case BuiltinData():
            train, validation = builtin_corpus(spec.name)
            return JsonlSource([train], [validation], field="text", fraction=0.0)
        case TextData():
            return TextSource(
                expand(spec.files),
                expand(spec.validation_files),
                spec.document,
                fraction=spec.validation_fraction,
            )
        case JsonlData():
            return JsonlSource(
                expand(spec.files),
                expand(spec.validation_files),
                field=spec.field,
                fraction=spec.validation_fraction,
            )
        case HuggingFaceData():
            return HubSource(spec)
        case _:
            assert_never(spec)


def builtin_corpus(name: str) -> tuple[Path, Path]:
    """Training and validation file of a corpus that comes with the package."""
    folder = Path(__file__).resolve().parent.parent / "corpus"
    return folder / f"{name}-train.jsonl.xz", folder / f"{name}-validation.jsonl.xz"


class JsonlSource:
    """JSON Lines files: one document a line, under one key."""

    is_remote = False

    def __init__(self, train: list[Path], validation: list[Path], *, field: str, fraction: float) -> None:
        self._files: dict[Part, list[Path]] = {"train": train, "validation": validation or train}
        self._field = field
        self._fraction = 0.0 if validation else fraction

    def documents(self, part: Part) -> Iterator[str]:
        for path in self._files[part]:
            for text in self._read(path):
                if not self._fraction or is_held_out(text, self._fraction) == (part == "validation"):
                    yield text

    def fingerprint(self, part: Part) -> str:
        hashes = [hash_file(path) for path in self._files[part]]
        return json.dumps(["jsonl", hashes, self._field, self._fraction, part])

    def _read(self, path: Path) -> Iterator[str]:
        with open_text(path) as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._text_of(line, path, number)
            except UNREADABLE as error:
                raise DataError(f"{path}: cannot be read as text ({error})") from error

    def _text_of(self, line: str, path: Path, number: int) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error
        if not isinstance(record, dict) or self._field not in record:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path}:{number}: no key {self._field!r} (found: {keys}); set data.field")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: {self._field} is not a text but {type(text).__name__}")
        return text


class TextSource:
    """Plain text files, cut into documents by file, line or blank line."""

    is_remote = False

    def __init__(
        self,
        train: list[Path],
        validation: list[Path],
        document: Literal["file", "line", "paragraph"],
        *,
        fraction: float,
    ) -> None:
        self._files: dict[Part, list[Path]] = {"train": train, "validation": validation or train}
        self._document = document
        self._fraction = 0.0 if validation else fraction

    def documents(self, part: Part) -> Iterator[str]:
        for path in self._files[part]:
            try:
                yield from self._whole(path, part) if self._document == "file" else self._pieces(path, part)
            except UNREADABLE as error:
                raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error

    def fingerprint(self, part: Part) -> str:
        hashes = [hash_file(path) for path in self._files[part]]
        return json.dumps(["text", hashes, self._document, self._fraction, part])

    def _whole(self, path: Path, part: Part) -> Iterator[str]:
        with open_text(path) as file:
            text = file.read()
        if self._fraction:
            border = self._border(text)
            text = text[:border] if part == "train" else text[border:]
        if text.strip():
            yield text

    def _border(self, text: str) -> int:
        """Where the held-out end of a file begins: after a line, else after a space, else anywhere."""
        border = int(len(text) * (1 - self._fraction))
        for mark in ("\n", " "):
            found = text.rfind(mark, border // 2, border)
            if found >= 0:
                return found + 1
        return border

    def _pieces(self, path: Path, part: Part) -> Iterator[str]:
        for text in self._lines(path) if self._document == "line" else self._paragraphs(path):
            if not self._fraction or is_held_out(text, self._fraction) == (part == "validation"):
                yield text

    @staticmethod
    def _lines(path: Path) -> Iterator[str]:
        with open_text(path) as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\n")

    @staticmethod
    def _paragraphs(path: Path) -> Iterator[str]:
        lines: list[str] = []
        with open_text(path) as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).rstrip("\n")
                    lines = []
        if lines:
            yield "".join(lines).rstrip("\n")
