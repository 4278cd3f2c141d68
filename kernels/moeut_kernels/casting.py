"""Types under autocast, and low-precision copies of weights that are made once and used many times.

An op multiplies in the dtype of its rows. A weight of another dtype (a float32 master) is multiplied through a copy,
but its gradient goes straight to the master, in the master's dtype: no rounding of gradients to bfloat16 in between.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16
"""Sides of padded copies are multiples of this: rows then begin at multiples of 16 bytes, as wide loads need."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op multiplies: the autocast dtype where autocast is on and `x` takes part in it."""
    kind = x.device.type
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide_float(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is: what sums and statistics are formed in."""
    return x if x.dtype == torch.float64 else x.float()


def cast_weights(*weights: Tensor, dtype: torch.dtype, padded: bool = False) -> tuple[Tensor, ...]:
    """Copies without gradient to hand to the ops as `casts`, made once a step and used by every application.

    A weight that already has `dtype` is returned as it is. padded: round the last two dimensions of a copy up to a
    multiple of 16 with zeros, so that products with odd widths run at full speed; not for gated activations or biases.
    """
    copies = (weight.detach().to(dtype) for weight in weights)
    if not padded:
        return tuple(copies)
    return tuple(
        copy if weight.dtype == dtype else _padded(copy) for weight, copy in zip(weights, copies, strict=True)
    )


def _padded(copy: Tensor) -> Tensor:
    rows, columns = -copy.shape[1] % ALIGNMENT, -copy.shape[2] % ALIGNMENT
    return pad(copy, (0, columns, 0, rows)) if rows or columns else copy  # a pad by nothing copies, too


def copy_for(weight: Tensor, cast: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """The copy that an op multiplies by; None where the weight itself has the right dtype."""
    if weight.dtype == dtype:
        return None
    if cast is None:
        return weight.detach().to(dtype)
    sides = zip(cast.shape, weight.shape, strict=True)
    if cast.dtype != dtype or len(cast) != len(weight) or not all(0 <= a - b < ALIGNMENT for a, b in sides):
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(weight.shape)}, got {cast.dtype} of {tuple(cast.shape)}"
        )
    return cast


def widen(x: Tensor, width: int) -> Tensor:
    """Zero columns behind those of `x` [..., D] up to `width`, as its padded weight has zero rows."""
    return x if torch.jit.is_tracing() or x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def of_master(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a copy [E, D', F'] as that of its master [E, D, F], whose sides may be shorter."""
    return gradient[:, : weight.shape[1], : weight.shape[2]].to(weight.dtype).contiguous()
