"""Chunks of text into ids, in this process or in several, always in order.

Workers are plain child processes that read chunks from a pipe and answer on another. They need nothing of this
process, so neither its threads nor a script without a main guard matter; and a child whose pipe ends goes home, so none
outlives a parent that was killed. One thread a worker carries the chunks; at most `2 * workers` are under way.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from moeut_compose.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from moeut_compose.data.shards import Chunk
    from moeut_compose.data.tokenizer import Tokenizer

_WORTH_CHARACTERS = 32 << 20
"""Text after which starting workers pays."""
_AUTO_WORKERS = 8
"""More would not hold 1 GiB, and one reader hardly feeds them."""


class Encoded(NamedTuple):
    """Ids of the documents of a chunk."""

    ids: np.ndarray
    lengths: list[int]
    """Ids of each document."""


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, dtype: np.dtype, *, num_threads: int = 1
) -> Encoded:
    """Encode documents, each on its own."""
    ids = tokenizer.encode_batch(texts, num_threads=num_threads)
    lengths = [len(document) for document in ids]
    return Encoded(np.fromiter(chain.from_iterable(ids), dtype, count=sum(lengths)), lengths)


def encode_chunks(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, dtype: np.dtype, workers: int | Literal["auto"]
) -> Generator[tuple[Chunk, Encoded]]:
    """Every chunk and its ids, in order. Raises `DataError` if a worker is lost."""
    count = min(_AUTO_WORKERS, usable_cpus()) if workers == "auto" else workers
    if workers == "auto":
        n_characters = 0
        while n_characters < _WORTH_CHARACTERS:
            chunk = next(chunks, None)
            if chunk is None:
                return
            n_characters += sum(map(len, chunk.texts))
            yield chunk, encode_texts(chunk.texts, tokenizer, dtype, num_threads=-1)
    if count == 1:
        for chunk in chunks:
            yield chunk, encode_texts(chunk.texts, tokenizer, dtype)
    else:
        yield from _encode_in_processes(chunks, tokenizer, dtype, count)


def usable_cpus() -> int:
    """CPUs that this process may use: of its affinity and, where a control group sets one, its quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(found, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or `max`
        return found


def _encode_in_processes(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, dtype: np.dtype, n_workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    with _workers(n_workers, tokenizer, dtype) as (idle, threads):
        for chunk in chunks:
            waiting.append((chunk, threads.submit(_ask, idle, chunk.texts)))
            if len(waiting) == 2 * n_workers:
                first, answer = waiting.popleft()
                yield first, answer.result()
        for chunk, answer in waiting:
            yield chunk, answer.result()


@contextmanager
def _workers(
    count: int, tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[queue.SimpleQueue[Worker], ThreadPoolExecutor]]:
    """Started workers, and a thread for each; however the work ends, they end with it."""
    started: list[Worker] = []
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(count, thread_name_prefix="tokenise")
    try:
        for _ in range(count):
            worker = Worker()
            started.append(worker)
            worker.send((tokenizer.model, dtype.str))
            idle.put(worker)
        yield idle, threads
    finally:
        for worker in started:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in started:
            worker.close()


def _ask(idle: queue.SimpleQueue[Worker], texts: list[str]) -> Encoded:
    worker = idle.get()
    try:
        worker.send(texts)
        return worker.receive()
    finally:
        idle.put(worker)


class Worker:
    """One child process. Raises `DataError` where it cannot be started or is lost."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moeut_compose.data.encoding_worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                process_group=0 if os.name == "posix" else None,  # Ctrl-C is the parent's to answer
            )
        except OSError as error:
            self._errors.close()
            raise DataError(f"cannot start a process that tokenises: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Encoded:
        assert self._process.stdout is not None
        try:
            return Encoded(*pickle.load(self._process.stdout))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise self._lost() from error

    def _lost(self) -> DataError:
        self._process.kill()
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return DataError(
            f"a process that tokenises {how}{': ' if said else ''}{''.join(said)}; the same command goes on from what "
            "is done; if memory ran out, set recipe.data.workers lower"
        )

    def kill(self) -> None:
        """End it at once; the thread that waits for it is told by its pipe."""
        self._process.kill()

    def close(self) -> None:
        """Take leave of a killed process."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still to be sent
                pipe.close()  # type: ignore[union-attr]
        self._errors.close()
