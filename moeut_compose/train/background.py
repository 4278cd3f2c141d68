"""Writing checkpoints while training goes on.

What is to be written is copied to the host first, so training may change the originals. There is one writer: the next
checkpoint waits for the one before, and so does the end of a run. What goes wrong is raised there.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class BackgroundWriter:
    """At most one checkpoint in the making."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._step: int | None = None
        self._work: Future[None] | None = None

    def start(self, step: int, write: Callable[[], None]) -> None:
        """Begin to write the checkpoint of a step; `finish` comes first."""
        assert self._work is None, "one checkpoint at a time"
        self._step, self._work = step, self._thread.submit(write)

    def is_writing(self, step: int) -> bool:
        """Whether the checkpoint of this step has been begun and not been asked for since."""
        return self._work is not None and self._step == step

    def finish(self) -> None:
        """Wait until nothing is being written. Raises what writing raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Wait for what was begun, whatever becomes of it."""
        self._thread.shutdown()


def host_copy(value: Any) -> Any:
    """A copy of nested dicts, lists and tensors, on the CPU."""
    match value:
        case torch.Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            return {key: host_copy(part) for key, part in value.items()}
        case list() | tuple():
            return [host_copy(part) for part in value]
        case _:
            return value
