"""Which implementation runs: chosen by device, overridable by a context manager or by the environment.

The choice is made once per call in the public functions and travels with the op as an argument, so that a backward
always runs on the implementation that ran the forward.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor

from moeut_kernels.grouping import suited, takes_batches

BACKENDS = ("auto", "triton", "grouped_mm", "bmm", "torch")
VARIABLE = "MOEUT_COMPOSE_BACKEND"

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
    float32, bfloat16 and float16, and elsewhere what suits best of PyTorch's products, see `grouping.suited`. "bmm"
    stands for "grouped_mm" but in float32 on a CPU. "torch" is the definition: one matrix product per expert. float64
    always takes it.
    """
    requested = backend()
    if requested == "auto":
        on_triton = x.device.type == "cuda" and TRITON_IS_INSTALLED
        requested = "triton" if on_triton else suited(x, each)
    if requested == "triton" and not x.dtype.is_floating_point:
        return requested
    if requested == "bmm" and not takes_batches(x):
        requested = "grouped_mm"
    return "torch" if x.dtype.itemsize == 8 else requested
