"""Types under autocast, and low-precision copies of weights that are made once and used many times.

An op multiplies in the dtype of its rows. A weight of another dtype (a float32 master) is multiplied through a copy,
but its gradient goes straight to the master, in the master's dtype: no rounding of gradients to bfloat16 in between.
"""

import torch
from torch import Tensor


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


def cast_weights(*weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies without gradient to hand to the ops as `casts`, made once a step and used by every application.

    A weight that already has `dtype` is returned as it is.
    """
    return tuple(weight.detach().to(dtype) for weight in weights)


def copy_for(weight: Tensor, cast: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """The copy that an op multiplies by; None where the weight itself has the right dtype."""
    if weight.dtype == dtype:
        return None
    if cast is None:
        return weight.detach().to(dtype)
    if cast.dtype != dtype or cast.shape != weight.shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(weight.shape)}, got {cast.dtype} of {tuple(cast.shape)}"
        )
    return cast
