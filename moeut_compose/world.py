"""The processes that work on one run, as `torchrun` started them; most often there is one.

Tensors travel over the device's back end, small objects and decisions over a second group on the CPU, which may
take its time: while one process tokenises for hours, the others wait for it there.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_PATIENCE = timedelta(days=7)
"""How long processes wait for one that prepares data."""

T = TypeVar("T")


class PeerFailed(Exception):
    """Another process of the run could not go on, and has said why."""


class PeerLost(Exception):
    """Another process of the run does not answer any more."""


class World:
    """This process among `size`; alone, every method returns at once what it was given."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._control: dist.ProcessGroup | None = None
        self._asked: tuple[Tensor, dist.Work] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints, writes files and holds the lock of the run folder."""
        return self.rank == 0

    def open(self, device: torch.device) -> None:
        """Meet the other processes. Raises `PeerLost`."""
        if self.size == 1:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with translated():
            dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def close(self) -> None:
        """Leave the group, if `open` has joined one."""
        if self._control is not None and dist.is_initialized():
            dist.destroy_process_group()
        self._control = None

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, on every process.

        Whatever it raises is raised on the main process; the others raise `PeerFailed`.
        """
        if self.size == 1:
            return work()
        if not self.is_main:
            ok, value = self._broadcast(None)
            if not ok:
                raise PeerFailed(value)
            return cast("T", value)
        try:
            result = work()
        except BaseException as error:
            self._broadcast((False, str(error)))
            raise
        self._broadcast((True, result))
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, computed on the main process before the others begin with it."""
        if self.size == 1:
            return work()
        results: list[T] = []
        self.on_main(lambda: results.append(work()))
        return results[0] if results else work()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with translated():
            dist.all_gather_object(values, value, group=self._control)
        return cast("list[T]", values)

    def largest(self, value: int) -> int:
        """The largest value of all processes; waits for them."""
        if self.size == 1:
            return value
        told = torch.tensor(value)
        with translated():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return int(told)

    def largest_late(self, value: int) -> int:
        """The largest of the values that the call before this one was given; alone, `value`. Hardly ever waits.

        Every process learns the same at the same call, so it may decide by it. The first call returns 0.
        """
        if self.size == 1:
            return value
        earlier, told = self._asked, torch.tensor(value)
        with translated():
            self._asked = (told, dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control, async_op=True))
            if earlier is None:
                return 0
            earlier[1].wait()
        return int(earlier[0])

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes, name by name; all hold floating-point tensors of the same names and shapes."""
        summed = self.sum(values)
        return summed if self.size == 1 else {name: total / self.size for name, total in summed.items()}

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes, name by name, sent as one tensor."""
        if self.size == 1 or not values:
            return values
        flat = torch.cat([value.detach().double().flatten() for value in values.values()])
        with translated():
            dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {
            name: part.view(value.shape).to(value.dtype)
            for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def _broadcast(self, value: object) -> tuple[bool, object]:
        box = [value]
        with translated():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return cast("tuple[bool, object]", box[0])


@contextmanager
def translated() -> Iterator[None]:
    """Errors of the back ends that tell of a lost process become `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if not tells_of_a_lost_peer(error):
            raise
        raise PeerLost(_gist(error)) from error


def _gist(error: RuntimeError) -> str:
    """The first line without its place in the back end's source and without advice."""
    line = re.sub(r"\[\S+\.(cc|cpp|h):\d+\] ", "", str(error).splitlines()[0])
    return line.partition(". This is")[0]


def tells_of_a_lost_peer(error: RuntimeError) -> bool:
    """Whether a back end gave up waiting; gloo has no error type of its own."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection closed by peer" in text


def started_world() -> World:
    """This process among those that `torchrun` has started; raises `ValueError` for numbers that make no sense."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} must lie in 0..WORLD_SIZE-1={size - 1}")
    return World(rank, size)


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))
