"""Reading the batches of the next steps while the device works on this one.

Which windows a step sees is a function of its number, so reading ahead changes nothing but the waiting, which is
measured.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_AHEAD = 2
"""Batches that are read before they are asked for."""


class Prefetcher:
    """Batches by step number, read by a thread."""

    def __init__(self, read: Callable[[int], Tensor], *, steps: int, pin: bool) -> None:
        """`read` makes the batch of a step below `steps`; `pin` it, so that a GPU copies it without waiting."""
        self._read = read
        self._steps = steps
        self._pin = pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: dict[int, Future[Tensor]] = {}
        self._waited = 0.0

    def __call__(self, step: int) -> Tensor:
        """The batch of a step. Raises what reading raised."""
        began = time.perf_counter()
        for number in range(step, min(step + 1 + _AHEAD, self._steps)):
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self._make, number)
        batch = self._coming.pop(step).result()
        for number in [number for number in self._coming if number < step]:
            del self._coming[number]
        self._waited += time.perf_counter() - began
        return batch

    def take_waited(self) -> float:
        """Seconds spent waiting for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Read nothing more."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> Tensor:
        batch = self._read(step)
        return batch.pin_memory() if self._pin else batch
