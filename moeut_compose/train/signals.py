"""Turning SIGINT and SIGTERM into an orderly stop.

While data is prepared a signal stops at once. While the model trains it is only noted, and the loop asks
between micro-batches, so that a checkpoint holds whole steps. A second signal always stops at once.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moeut_compose.train.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


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

    def poll(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self.signum is not None:
            raise StopRequested(self.signum)

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
def catch_signals() -> Iterator[StopSignal]:
    """Handle SIGINT and SIGTERM while inside. Only the main thread can; in others nothing is caught."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {signum: signal.signal(signum, stop.handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
