"""Sources of text: documents of a training part and a held-out part, in a fixed order.

A source is opened from its description and read as often as needed. It holds no position: where reading
starts is decided by whoever tokenises, and what training sees is decided by `windows`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TextIO, assert_never

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import UNREADABLE, as_text, expand, hash_file
from moeut_compose.data.hub import HubSource
from moeut_compose.data.records import read_records
from moeut_compose.data.shards import FileShard
from moeut_compose.data.split import is_held_out
from moeut_compose.spec.recipe import BuiltinData, HuggingFaceData, JsonlData, TextData

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moeut_compose.data.shards import Shard
    from moeut_compose.spec.recipe import TextDataSpec

Part = Literal["train", "validation"]


class Source(Protocol):
    """Documents of two parts, in a fixed order."""

    is_remote: bool
    """Reading costs network traffic, so no more than needed is read."""

    def shards(self, part: Part) -> Sequence[Shard]:
        """The pieces of a part, in order."""

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
    """Files of records, JSON Lines or Parquet: a document is what one key or column holds."""

    is_remote = False

    def __init__(self, train: list[Path], validation: list[Path], *, field: str, fraction: float) -> None:
        self._files: dict[Part, list[Path]] = {"train": train, "validation": validation or train}
        self._field = field
        self._fraction = 0.0 if validation else fraction

    def shards(self, part: Part) -> list[FileShard]:
        def read(file: BinaryIO, path: Path) -> Iterator[str]:
            for text in read_records(file, path, self._field):
                if not self._fraction or is_held_out(text, self._fraction) == (part == "validation"):
                    yield text

        return [FileShard(path, read) for path in self._files[part]]

    def documents(self, part: Part) -> Iterator[str]:
        for shard in self.shards(part):
            yield from shard.documents()

    def fingerprint(self, part: Part) -> str:
        hashes = [hash_file(path) for path in self._files[part]]
        return json.dumps(["jsonl", hashes, self._field, self._fraction, part])


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

    def shards(self, part: Part) -> list[FileShard]:
        def read(file: BinaryIO, path: Path) -> Iterator[str]:
            try:
                with as_text(file, path) as lines:
                    yield from (
                        self._whole(lines, part) if self._document == "file" else self._pieces(lines, part)
                    )
            except UNREADABLE as error:
                raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error

        return [FileShard(path, read) for path in self._files[part]]

    def documents(self, part: Part) -> Iterator[str]:
        for shard in self.shards(part):
            yield from shard.documents()

    def fingerprint(self, part: Part) -> str:
        hashes = [hash_file(path) for path in self._files[part]]
        return json.dumps(["text", hashes, self._document, self._fraction, part])

    def _whole(self, file: TextIO, part: Part) -> Iterator[str]:
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

    def _pieces(self, file: TextIO, part: Part) -> Iterator[str]:
        for text in _lines(file) if self._document == "line" else _paragraphs(file):
            if not self._fraction or is_held_out(text, self._fraction) == (part == "validation"):
                yield text


def _lines(file: TextIO) -> Iterator[str]:
    for line in file:
        if line.strip():
            yield line.rstrip("\n")


def _paragraphs(file: TextIO) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")
