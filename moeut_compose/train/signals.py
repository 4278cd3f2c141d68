"""Turning SIGINT and SIGTERM into an orderly stop.

While data is prepared a signal stops at once. While the model trains it is only noted, and the loop asks
between micro-batches, so that a checkpoint holds whole steps. A second signal always stops at once.

A process that shares its work can wait for another one that is gone, and then it asks no more. So where there are
several, a thread watches over the first signal and ends the process if no answer comes.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from moeut_compose.train.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from moeut_compose.world import World

_PATIENCE = 20.0
"""Seconds; `torchrun` kills 30 seconds after it has sent SIGTERM."""


class StopRequested(Exception):
    """The loop asked and was told to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """What a signal handler noted."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False
        self._answered = threading.Event()

    def answered(self) -> None:
        """The stop is under way: what follows may take its time."""
        self._answered.set()

    def poll(self, agreed: int | None = None) -> None:
        """Raise `StopRequested` if a signal has come; with `agreed`, if that is a signal and not 0."""
        signum = self.signum if agreed is None else agreed
        if signum:
            raise StopRequested(signum)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal is only noted, for `poll`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.signum = self.signum is None, signum
        if not (first and self._deferred):
            raise Interrupted(signum)


@contextmanager
def catch_signals(world: World) -> Iterator[StopSignal]:
    """Handle SIGINT and SIGTERM while inside. Only the main thread can; in others nothing is caught."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {signum: signal.signal(signum, stop.handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _watched(stop, world) if world.size > 1 else nullcontext():
            yield stop
    finally:
        stop.answered()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _watched(stop: StopSignal, world: World) -> Iterator[None]:
    """End the process `_PATIENCE` seconds after a signal that nobody answers, as when the main thread waits in vain."""
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)

    def watch() -> None:
        number = os.read(hears, 1)
        if number and not stop._answered.wait(_PATIENCE):
            text = f"rank {world.rank}: stopped by a signal while it waited for the others; nothing new is saved\n"
            os.write(2, text.encode())
            os._exit(128 + number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.answered()
        signal.set_wakeup_fd(before)
        os.close(tells)  # the thread reads the end of the pipe
        thread.join()
        os.close(hears)
