"""What stands for the choice of kernels in exported code: PyTorch, on every device."""

from __future__ import annotations

from torch import Tensor


def resolve(x: Tensor, each: tuple[int, int] | None = None) -> str:
    """Grouped products where PyTorch has them for the dtype, one product per expert elsewhere."""
    return "torch" if x.dtype.itemsize == 8 else "grouped_mm"
