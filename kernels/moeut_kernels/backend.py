"""Which implementation runs: chosen by device, overridable by a context manager or by the environment.

The choice is made once per call in the public functions and travels with the op as an argument, so that a backward
always runs on the implementation that ran the forward.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "grouped_mm", "bmm", "torch")
VARIABLE = "MOEUT_COMPOSE_BACKEND"

LEAST_THREADS = 4
"""Batched products are worth while from so many threads on: fewer hardly wait for one another."""

MOST_WORK = 2**20
"""They are up to so many multiply-adds of an average expert on each thread."""

LEAST_ROWS, MOST_ELEMENTS = 16, 2**16
"""And from so many rows of an average expert on, up to matrices of such a size: they may have to be copied, which must
cost less than starting a product."""

_override: str | None = None


TRITON_IS_INSTALLED = find_spec("triton") is not None
"""False on platforms without a Triton wheel. Triton itself is imported when a kernel first runs."""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}={name!r} is not one of {', '.join(BACKENDS)}")
    return name


_environment = _checked(os.environ.get(VARIABLE, "auto") or "auto", VARIABLE)


def backend() -> str:
    """The requested backend: `use_backend` first, then `MOEUT_COMPOSE_BACKEND` as read at import, then "auto"."""
    return _environment if _override is None else _override


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every expert op inside the block on one backend: "auto", "triton", "grouped_mm" or "torch".

    Raises `ValueError` for an unknown name.
    """
    global _override
    previous, _override = _override, _checked(name, "backend")
    try:
        yield
    finally:
        _override = previous


def resolve(x: Tensor, each: tuple[int, int] | None = None) -> str:
    """The backend that a call with `x` runs on: "triton", "grouped_mm", "bmm" or "torch".

    each: rows and matrix elements of an average expert, where the call multiplies. "auto" takes Triton on CUDA in
    float32, bfloat16 and float16, and elsewhere PyTorch's grouped matmul, or its batched one where experts have too
    little to do for the threads of this process. "bmm" stands for "grouped_mm" but in float32 on a CPU. "torch" is the
    definition: one matrix product per expert. float64 always takes it.
    """
    requested = backend()
    batches = x.device.type == "cpu" and x.dtype == torch.float32
    if requested == "auto" and x.device.type == "cuda" and TRITON_IS_INSTALLED:
        requested = "triton"
    if requested == "auto" and batches and each is not None and _batches_pay(*each):
        requested = "bmm"
    if requested == "auto" or (requested == "bmm" and not batches):
        requested = "grouped_mm"
    if requested == "triton" and not x.dtype.is_floating_point:
        return requested
    return "torch" if x.dtype.itemsize == 8 else requested


@torch.compiler.assume_constant_result
def n_threads() -> int:
    """Threads of an operation in this process."""
    return torch.get_num_threads()


def _batches_pay(rows: int, elements: int) -> bool:
    """Not in a program that is traced or exported: it is for other numbers of rows, too."""
    if n_threads() < LEAST_THREADS or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return rows >= LEAST_ROWS and elements <= MOST_ELEMENTS and rows * elements <= MOST_WORK * n_threads()
