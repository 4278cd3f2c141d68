"""How far a text is tokenised: written beside the unfinished tokens, so that the work goes on after any end.

The order of writing makes it true: ids reach the disk before the journal that counts them, and the journal is replaced
as a whole. What lies behind the counted ids is cut off before the work goes on.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from moeut_compose.data.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from moeut_compose.progress import Reporter

JOURNAL = "progress.json"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """Shards and documents of the next one that are done, and what they gave."""

    shard: int = 0
    document: int = 0
    n_tokens: int = 0
    n_documents: int = 0
    n_bytes: int = 0


def read_progress(folder: Path, tokens: Path, itemsize: int) -> Progress:
    """What a journal says, or the beginning if there is none or it tells of more ids than there are."""
    try:
        said = json.loads((folder / JOURNAL).read_text())
        progress = Progress(*(said[field.name] for field in fields(Progress)))
        whole = tokens.stat().st_size >= progress.n_tokens * itemsize
    except (OSError, ValueError, TypeError, KeyError):
        return Progress()
    return progress if whole else Progress()


def write_progress(folder: Path, file: BinaryIO, progress: Progress) -> None:
    """Flush the ids to disk, then say how many there are."""
    file.flush()
    os.fsync(file.fileno())
    write_atomically(folder / JOURNAL, json.dumps(asdict(progress)).encode())


@contextmanager
def sole_writer(path: Path, reporter: Reporter) -> Iterator[bool]:
    """Hold the lock file `path`; while another process holds it, wait. It goes with its process, however it ends.

    Gives whether the lock is held: on Windows and in some network folders files cannot be locked.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    told = False
    while True:
        with path.open("w") as file:
            is_locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = _is_still(path, file)
            except BlockingIOError:
                is_ours = False
            except OSError:  # this file system has no locks
                is_ours, is_locked = True, False
            if is_ours:
                try:
                    yield is_locked
                finally:
                    path.unlink(missing_ok=True)
                return
        if not told:
            reporter.note("another process prepares the same text; waiting for it")
            told = True
        time.sleep(_POLL_SECONDS)


def _is_still(path: Path, file: object) -> bool:
    """Whether a path still names the open file; its last holder may have deleted it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))  # type: ignore[attr-defined]
    except FileNotFoundError:
        return False
