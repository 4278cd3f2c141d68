"""Pieces of a source that are read one after the other, from any document on.

A place is a shard and a number of its documents, so going on means passing whole shards by and reading only into
the one where the work stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, Protocol

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import open_binary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path


class Shard(Protocol):
    """Documents in a fixed order."""

    def documents(self) -> Iterator[str]:
        """Every document, from the first."""

    def n_bytes(self) -> int | None:
        """Bytes on disk; None where they are not known."""

    def n_read(self) -> int:
        """How many of `n_bytes` the newest reading has behind it."""


class FileShard:
    """Documents of one file."""

    def __init__(self, path: Path, read: Callable[[BinaryIO, Path], Iterator[str]]) -> None:
        """`read` makes documents of an open file; the path is for its messages."""
        self._path = path
        self._read = read
        self._file: BinaryIO | None = None

    def documents(self) -> Iterator[str]:
        with open_binary(self._path) as file:
            self._file = file
            yield from self._read(file, self._path)

    def n_bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror or error}") from error

    def n_read(self) -> int:
        if self._file is None:
            return 0
        return self.n_bytes() if self._file.closed else self._file.tell()


class StreamShard:
    """Documents that come from anywhere but a file."""

    def __init__(self, open_stream: Callable[[], Iterable[str]]) -> None:
        self._open_stream = open_stream

    def documents(self) -> Iterator[str]:
        yield from self._open_stream()

    def n_bytes(self) -> None:
        return None

    def n_read(self) -> int:
        return 0


@dataclass(frozen=True)
class Place:
    """Between two documents: so many shards, and so many documents of the next one, lie before it."""

    shard: int = 0
    document: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents, each ended by the separator."""

    texts: list[str]
    end: Place
    n_read: int
    """Bytes of files read when the last document was."""


def read_chunks(
    shards: Sequence[Shard], start: Place, *, separator: str, max_characters: int
) -> Iterator[Chunk]:
    """The non-empty documents from `start` on, in chunks of about `max_characters`, never splitting one."""
    texts: list[str] = []
    size, behind = 0, n_bytes_before(shards, start)
    for number, shard in enumerate(shards[start.shard :], start.shard):
        first = start.document if number == start.shard else 0
        for document, text in enumerate(islice(shard.documents(), first, None), first + 1):
            if text:
                texts.append(text + separator)
                size += len(text) + len(separator)
            if size >= max_characters:
                yield Chunk(texts, Place(number, document), behind + shard.n_read())
                texts, size = [], 0
        behind += shard.n_bytes() or 0
    if texts:
        yield Chunk(texts, Place(len(shards), 0), behind)


def n_bytes_before(shards: Sequence[Shard], place: Place) -> int:
    """Bytes on disk of the shards that lie wholly before a place."""
    return sum(shard.n_bytes() or 0 for shard in shards[: place.shard])


def total_bytes(shards: Sequence[Shard]) -> int | None:
    """Bytes on disk of all shards; None if those of one are not known."""
    sizes = [shard.n_bytes() for shard in shards]
    return None if None in sizes else sum(size for size in sizes if size is not None)
