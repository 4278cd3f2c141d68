"""Work beside the main stream: products that fill the tensor cores while a sum waits for memory.

A weight gradient is bound by arithmetic and a gathered sum by memory bandwidth; one after the other, each leaves the
resource of the other idle. The side stream has priority: its few large programs find room among the many small ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Launch the block on a side stream, after everything launched so far. `join` before its results are used.

    Memory the block writes must have been allocated outside it. On a device without streams the block just runs.
    """
    if device.type != "cuda":
        yield
        return
    side = _stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """Let the current stream wait for everything launched beside it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device))
