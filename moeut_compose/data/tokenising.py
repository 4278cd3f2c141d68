"""The work that fills a token file: read, encode, write, and note every now and then how far it is."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moeut_compose.data.encoding import encode_chunks
from moeut_compose.data.journal import Progress, read_progress, write_progress
from moeut_compose.data.shards import Place, n_bytes_before, read_chunks, total_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np

    from moeut_compose.data.encoding import Encoded
    from moeut_compose.data.shards import Chunk, Shard
    from moeut_compose.data.tokenizer import Tokenizer
    from moeut_compose.progress import Reporter, Task

_CHUNK_CHARACTERS = 1 << 20
_JOURNAL_BYTES = 16 << 20
"""Bytes of ids between two entries: what a killed process loses at most."""
_LARGE_CHARACTERS = 64 << 20
_MB = 1e6


@dataclass(frozen=True)
class Tokenising:
    """Text, and how it becomes ids."""

    shards: Sequence[Shard]
    tokenizer: Tokenizer
    dtype: np.dtype
    separator: str
    max_tokens: int | None
    workers: int | Literal["auto"]
    title: str

    def write(self, folder: Path, reporter: Reporter) -> Progress:
        """Bring `tokens.bin` and the journal in `folder` from where they are to the end.

        Raises `DataError` for the text and `OSError` for the disk.
        """
        for stray in folder.glob(".*.tmp"):  # of a journal entry that was interrupted
            stray.unlink()
        path = folder / "tokens.bin"
        progress = read_progress(folder, path, self.dtype.itemsize)
        if progress.n_documents:
            reporter.note(
                f"{self.title}: going on after {progress.n_documents:,} documents, {progress.n_tokens:,} tokens"
            )
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(progress.n_tokens * self.dtype.itemsize)
            file.seek(0, 2)
            progress = self._extend(file, folder, progress, reporter)
            file.flush()
            os.fsync(file.fileno())
        return progress

    def _extend(self, file: BinaryIO, folder: Path, progress: Progress, reporter: Reporter) -> Progress:
        noted, meter = progress, _Meter(self, progress)
        with closing(self._encoded(progress)) as encoded, meter.task(self.title, reporter) as task:
            for chunk, answer in encoded:
                _warn_of_large(chunk, reporter)
                before, progress = progress.n_tokens, self._after(progress, chunk, answer)
                file.write(answer.ids[: progress.n_tokens - before].tobytes())
                task.advance(meter.gained(chunk, progress), detail=meter.detail(progress))
                if progress.n_tokens == self.max_tokens:
                    break
                if (progress.n_tokens - noted.n_tokens) * self.dtype.itemsize >= _JOURNAL_BYTES:
                    write_progress(folder, file, progress)
                    noted = progress
        return progress

    def _encoded(self, progress: Progress) -> Generator[tuple[Chunk, Encoded]]:
        chunks = read_chunks(
            self.shards, _place(progress), separator=self.separator, max_characters=_CHUNK_CHARACTERS
        )
        return encode_chunks(chunks, self.tokenizer, self.dtype, self.workers)

    def _after(self, progress: Progress, chunk: Chunk, answer: Encoded) -> Progress:
        """Progress with a chunk done, up to the document that reaches `max_tokens`."""
        n_tokens, n_documents, n_bytes = progress.n_tokens, progress.n_documents, progress.n_bytes
        for text, length in zip(chunk.texts, answer.lengths, strict=True):
            kept = length if self.max_tokens is None else min(length, self.max_tokens - n_tokens)
            n_tokens += kept
            n_documents += 1
            n_bytes += round(len(text.encode("utf-8", "replace")) * kept / max(1, length))
            if n_tokens == self.max_tokens:
                break
        return Progress(chunk.end.shard, chunk.end.document, n_tokens, n_documents, n_bytes)


class _Meter:
    """Progress for people: in tokens where their number is known, else in bytes of files, else in open-ended tokens."""

    def __init__(self, work: Tokenising, start: Progress) -> None:
        total = total_bytes(work.shards) if work.max_tokens is None else None
        self._in_bytes = total is not None
        self._total = work.max_tokens if total is None else total / _MB
        self._done = n_bytes_before(work.shards, _place(start)) / _MB if self._in_bytes else start.n_tokens

    def task(self, title: str, reporter: Reporter) -> AbstractContextManager[Task]:
        unit = "MB of files" if self._in_bytes else "tokens"
        return reporter.task(f"{title}, {unit}", total=self._total, done=self._done)

    def gained(self, chunk: Chunk, progress: Progress) -> float:
        """What a chunk adds, in the unit of the task."""
        now = max(self._done, chunk.n_read / _MB) if self._in_bytes else progress.n_tokens
        before, self._done = self._done, now
        return now - before

    def detail(self, progress: Progress) -> str:
        tokens = f", {progress.n_tokens:,} tokens" if self._in_bytes else ""
        return f"{progress.n_documents:,} documents{tokens}"


def _place(progress: Progress) -> Place:
    return Place(progress.shard, progress.document)


def _warn_of_large(chunk: Chunk, reporter: Reporter) -> None:
    largest = max(map(len, chunk.texts))
    if largest > _LARGE_CHARACTERS:
        reporter.warn(
            f"a document of {largest / _MB:,.0f} million characters is tokenised in one piece, which takes memory "
            "many times its size; data.document=paragraph or line cuts plain text smaller"
        )
