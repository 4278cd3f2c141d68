"""What stands for the choice of kernels in exported code: PyTorch, on every device."""

from __future__ import annotations

from moeut_kernels.grouping import suited
from torch import Tensor


def resolve(x: Tensor, work: int | None = None) -> str:
    """What suits a call with `x`, whose experts have so many multiply-adds."""
    return suited(x, work)
