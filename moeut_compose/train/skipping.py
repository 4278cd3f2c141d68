"""Steps that are not taken: whose loss or gradient is not finite, and how many there were.

The decision stays on the device. A fused AdamW is handed the verdict as it would be by a loss scale that overflowed,
and leaves weights, moments and step counts alone; other optimisers have to wait for it. The counts are read one step
late on a GPU, so that the device never runs dry; a late stop changes nothing, since skipped steps leave no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Skips(NamedTuple):
    """How many steps were skipped."""

    total: int
    """Since the run began."""
    in_a_row: int
    """Up to now, without one taken between them and without those that a float16 loss scale explains."""
    first: int
    """0-based number of the first step of this row; means nothing where the row is empty."""


class SkipCounter:
    """Counts skipped steps in a tensor on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def record(self, step: int, skipped: Tensor, excused: Tensor) -> None:
        """Count 0-based step `step`; both are boolean scalars. An excused skip neither lengthens nor ends a row."""
        total, row, first = self._counts.unbind()
        counts = skipped & ~excused
        first = torch.where(counts & (row == 0), step, first)
        self._counts = torch.stack((total + skipped, torch.where(skipped, row + counts, 0), first))

    def read(self) -> Skips:
        """The counts; waits for the device."""
        return Skips(*self._counts.tolist())

    def glance(self) -> Skips:
        """The counts, on a GPU those that the call before this one asked for."""
        if self._device.type != "cuda":
            return self.read()
        earlier = self._on_its_way
        copy = torch.empty(3, dtype=torch.int64, pin_memory=True)
        copy.copy_(self._counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._on_its_way = (copy, event)
        if earlier is None:
            return Skips(0, 0, 0)
        earlier[1].synchronize()
        return Skips(*earlier[0].tolist())

    def state_dict(self) -> dict[str, int]:
        return self.read()._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values = [state[name] for name in Skips._fields]
        self._counts = torch.tensor(values, dtype=torch.int64, device=self._device)


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimiser step unless the boolean scalar `skip` is set.

    A fused optimiser obeys on the device, for others the host reads `skip`.
    """
    if not optimizer.defaults["fused"]:
        if not skip.item():
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
