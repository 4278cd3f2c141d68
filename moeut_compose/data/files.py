"""Finding, opening and fingerprinting the files that hold text."""

from __future__ import annotations

import bz2
import errno
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from moeut_compose.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

UNREADABLE = (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a file that is no text, or a damaged archive, raises."""


def _open_zstandard(file: BinaryIO) -> BinaryIO:
    return import_arrow(".zst files").CompressedInputStream(file, "zstd")


_UNPACKERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".zst": _open_zstandard,
}


def expand(patterns: Iterable[str]) -> list[Path]:
    """The files that paths and glob patterns name, sorted within a pattern, each once.

    Raises `DataError` for a pattern that names no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        plain = Path(pattern).expanduser()
        hits = (
            [plain] if plain.is_file() else sorted(Path(hit) for hit in glob.glob(str(plain), recursive=True))
        )
        hits = [hit.resolve() for hit in hits if hit.is_file()]
        if not hits:
            raise DataError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(hits))
    return list(found)


def open_binary(path: Path) -> BinaryIO:
    """Open a file's bytes as they lie on disk. Raises `DataError` if it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def as_text(file: BinaryIO, path: Path) -> TextIO:
    """The UTF-8 text of an open file, unpacked on the way if its name says that it is packed."""
    unpack = _UNPACKERS.get(path.suffix)
    return io.TextIOWrapper(file if unpack is None else unpack(file), encoding="utf-8")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file as UTF-8, unpacking it on the way if its name says that it is packed."""
    with open_binary(path) as file, as_text(file, path) as text:
        yield text


def import_arrow(purpose: str) -> ModuleType:
    """Import `pyarrow`, which unpacks Zstandard and reads Parquet. Raises `DataError` if it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{purpose} are read by pyarrow, which is not installed: pip install pyarrow"
        ) from error
    return pyarrow


def read_plain(path: Path) -> bytes:
    """What a file holds. Raises `OSError` also for pipes and devices, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return path.read_bytes()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read again only if size or times have changed."""
    try:
        stat = path.stat()
        return _hash(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=1 << 16)
def _hash(path: Path, *_state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make renames inside a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: readers see the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
