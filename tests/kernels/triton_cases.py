"""Where and how closely Triton kernels are tested.

On a GPU in float32, bfloat16 and float16. Without one in Triton's interpreter, in a process of its own, because the
choice is made when Triton is imported: see `test_interpreter.py`.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = [pytest.mark.usefixtures("on_triton"), *([] if INTERPRETED else [pytest.mark.gpu])]
"""Marks of a module of such tests."""

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""Relative errors allowed."""
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(BOUNDS)
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def check(cases, op, dtype, **kwargs):
    """Compare an op on Triton with its definition."""
    cases.compare(cases.make(op, **kwargs), dtype=dtype, device=DEVICE, bound=BOUNDS[dtype])
