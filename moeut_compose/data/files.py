"""Finding, opening and fingerprinting the files that hold text."""

from __future__ import annotations

import bz2
import errno
import glob
import gzip
import hashlib
import lzma
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moeut_compose.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

UNREADABLE = (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a file that is no text, or a damaged archive, raises."""

_OPENERS: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


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


def open_text(path: Path) -> TextIO:
    """Open a text file as UTF-8, unpacking it on the way if its name says that it is packed."""
    opener = _OPENERS.get(path.suffix)
    try:
        if opener is not None:
            return opener(path, "rt", encoding="utf-8")
        return path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_plain(path: Path) -> bytes:
    """What a file holds. Raises `OSError` also for pipes and devices, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return path.read_bytes()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


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
