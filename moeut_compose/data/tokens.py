"""Tokenised text on disk: written once, in constant memory, and mapped into memory afterwards.

A token file is a folder with `tokens.bin` (ids, little endian) and `index.json`. It grows beside its final place
under a journal, from which interrupted work goes on, and is renamed when complete: one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import fsync_directory, read_plain
from moeut_compose.data.journal import JOURNAL, sole_writer
from moeut_compose.data.location import cache_folder
from moeut_compose.data.tokenising import Tokenising
from moeut_compose.progress import SilentReporter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from moeut_compose.data.shards import Shard
    from moeut_compose.data.sources import Part, Source
    from moeut_compose.data.tokenizer import Tokenizer
    from moeut_compose.progress import Reporter

_DTYPES = ("<u2", "<i4")
_BLOCK = 1 << 22
"""Ids that are counted at a time."""


@dataclass(frozen=True)
class TokenIndex:
    """What lies in a token file."""

    n_tokens: int
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of the text behind the tokens, separators included."""
    dtype: str


@dataclass(frozen=True)
class TokenFile:
    """Ids of a text, mapped into memory."""

    ids: np.ndarray
    index: TokenIndex
    byte_lengths: np.ndarray | None = None
    """`[V]` UTF-8 bytes of the text of each piece, see `Tokenizer.byte_lengths`."""

    def n_windows(self, context: int) -> int:
        """Windows of `context` inputs and as many targets; neighbours share one token."""
        return max(0, (self.index.n_tokens - 1) // context)

    def windows(self, indices: Iterable[int], context: int) -> np.ndarray:
        """Windows by number: `[n, context + 1]` int64, inputs `[:, :-1]` and targets `[:, 1:]`."""
        rows = [self.ids[index * context : index * context + context + 1] for index in indices]
        return np.stack(rows).astype(np.int64)

    def n_bytes(self, first: int, end: int) -> float:
        """UTF-8 bytes of the text behind ids `[first, end)`.

        By the bytes of their pieces, times what all pieces miss of all text: normalisation drops and adds some. Without
        `byte_lengths`, in proportion to their number.
        """
        if self.byte_lengths is None:
            return self.index.n_bytes * (end - first) / max(1, self.index.n_tokens)
        return self._bytes_of_pieces(first, end) * self._bytes_per_byte_of_pieces

    @cached_property
    def _bytes_per_byte_of_pieces(self) -> float:
        return self.index.n_bytes / max(1, self._bytes_of_pieces(0, self.index.n_tokens))

    def _bytes_of_pieces(self, first: int, end: int) -> int:
        assert self.byte_lengths is not None
        blocks = (self.ids[at : min(at + _BLOCK, end)] for at in range(first, end, _BLOCK))
        return sum(int(self.byte_lengths[block].sum()) for block in blocks)

    def check(self, vocab_size: int) -> None:
        """Raises `DataError` for ids outside a vocabulary, or text without bytes. Reads all of it."""
        if self.index.n_tokens and not (
            self.ids.min() >= 0 and self.ids.max() < vocab_size and self.index.n_bytes
        ):
            raise DataError(f"the tokens are not those of a text with a vocabulary of {vocab_size}")


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch of windows asks: of text `[B, T + 1]` the next token, of pairs `[B, 2, T]` the second of each."""
    if windows.dim() == 3:
        return windows[:, 0], windows[:, 1]
    return windows[:, :-1], windows[:, 1:]


def open_tokens(folder: Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Map a token file; with its tokenizer, parts of it know their bytes. Raises `DataError` if it is not whole."""
    try:
        index = TokenIndex(**json.loads(read_plain(folder / "index.json")))
        size = (folder / "tokens.bin").stat().st_size
        counts = (index.n_tokens, index.n_documents, index.n_bytes)
        if not all(type(count) is int and count >= 0 for count in counts) or index.dtype not in _DTYPES:
            raise ValueError(f"its index says {index}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder} is not a token file: {error}") from error
    if size != index.n_tokens * np.dtype(index.dtype).itemsize:
        raise DataError(f"{folder}/tokens.bin has {size} bytes, but its index says {index.n_tokens} tokens")
    byte_lengths = None if tokenizer is None else tokenizer.byte_lengths
    if index.n_tokens == 0:
        return TokenFile(np.empty(0, dtype=index.dtype), index, byte_lengths)
    return TokenFile(np.memmap(folder / "tokens.bin", dtype=index.dtype, mode="r"), index, byte_lengths)


def token_key(
    source: Source, part: Part, tokenizer: Tokenizer, *, separator: str, max_tokens: int | None
) -> str:
    """Names the tokens that a text, a tokenizer and options give; equal keys mean equal tokens."""
    parts = [source.fingerprint(part), tokenizer.fingerprint, separator, max_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def prepare_tokens(
    source: Source,
    part: Part,
    tokenizer: Tokenizer,
    *,
    separator: str,
    max_tokens: int | None = None,
    workers: int | Literal["auto"] = "auto",
    reporter: Reporter | None = None,
) -> TokenFile:
    """The tokens of one part of a source, from the cache if they were made before.

    The cache is keyed by the content of the text, the tokenizer and the options.
    """
    folder = cache_folder("tokens") / token_key(
        source, part, tokenizer, separator=separator, max_tokens=max_tokens
    )
    if not folder.is_dir():
        write_tokens(
            folder,
            source.shards(part),
            tokenizer,
            separator=separator,
            title=f"tokenising {part} text",
            max_tokens=max_tokens,
            workers=workers,
            reporter=reporter,
        )
    try:
        return open_tokens(folder, tokenizer)
    except DataError as error:
        raise DataError(f"{error}; delete that folder to make it again") from error


def write_tokens(
    folder: Path,
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    separator: str = "",
    title: str = "tokenising",
    max_tokens: int | None = None,
    workers: int | Literal["auto"] = "auto",
    reporter: Reporter | None = None,
) -> None:
    """Tokenise documents into a new token file at `folder`, stopping after `max_tokens` ids.

    Goes on where an earlier process stopped, and waits while another one is at it. The same ids come out whatever the
    number of `workers` and of interruptions. Raises `DataError`.
    """
    reporter = reporter or SilentReporter()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    work = Tokenising(shards, tokenizer, dtype, separator, max_tokens, workers, title)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(folder.with_name(f".{folder.name}.lock"), reporter) as is_alone:
            if folder.is_dir():  # made while this process waited
                return
            owner = "" if is_alone else f".{os.getpid()}"
            partial = folder.with_name(f".{folder.name}{owner}.part")
            partial.mkdir(exist_ok=True)
            try:
                done = work.write(partial, reporter)
                _publish(
                    partial, folder, TokenIndex(done.n_tokens, done.n_documents, done.n_bytes, dtype.str)
                )
            finally:
                if owner or folder.is_dir() or not (partial / JOURNAL).exists():
                    shutil.rmtree(partial, ignore_errors=True)
            (folder / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write tokens to {folder.parent}: {error.strerror or error}") from error


def _publish(temporary: Path, folder: Path, index: TokenIndex) -> None:
    """Give a folder with whole, flushed tokens its index and its final name."""
    with (temporary / "index.json").open("w") as file:
        json.dump(asdict(index), file)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(temporary)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same content
            raise
    fsync_directory(folder.parent)


def save_head(tokens: TokenFile, folder: Path, n_tokens: int | None) -> None:
    """Copy the first `n_tokens` ids of a token file into a new one, with their own bytes."""
    count = tokens.index.n_tokens if n_tokens is None else min(n_tokens, tokens.index.n_tokens)
    share = count / max(1, tokens.index.n_tokens)
    index = TokenIndex(
        n_tokens=count,
        n_documents=round(tokens.index.n_documents * share),
        n_bytes=round(tokens.n_bytes(0, count)),
        dtype=tokens.index.dtype,
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with (temporary / "tokens.bin").open("wb") as file:
            tokens.ids[:count].tofile(file)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, folder, index)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
