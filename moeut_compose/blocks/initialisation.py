"""Weight initialisation of the published models; each rule is written once, here."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def normal_(weight: Tensor, *, std: float) -> None:
    """Draw from N(0, std^2)."""
    nn.init.normal_(weight, std=std)


@torch.no_grad()
def truncated_normal_(weight: Tensor, *, std: float) -> None:
    """Draw from a unit normal cut at two deviations, then scale to the empirical deviation `std` exactly."""
    nn.init.trunc_normal_(weight, a=-2.0, b=2.0)
    weight.mul_(std / weight.std())


@torch.no_grad()
def uniform_(weight: Tensor, *, bound: float) -> None:
    """Draw from U(-bound, bound)."""
    nn.init.uniform_(weight, -bound, bound)


@torch.no_grad()
def xavier_uniform_(weight: Tensor, *, gain: float) -> None:
    """Draw from U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out)) for a `[fan_out, fan_in]` matrix."""
    fan_out, fan_in = weight.shape
    uniform_(weight, bound=gain * math.sqrt(6.0 / (fan_in + fan_out)))


@torch.no_grad()
def keep_row_deviations_(weight: Tensor) -> None:
    """Rescale rows to their own deviation over that of the unit rows, as the published attention routers do.

    Row i becomes x_i / |x_i| * std(x_i) / std(all unit rows): nearly a no-op, kept because the runs had it.
    """
    deviation = weight.std(-1, keepdim=True) if weight.shape[-1] > 1 else torch.ones_like(weight)
    weight.div_(weight.norm(dim=-1, keepdim=True))
    if weight.numel() > 1:
        weight.mul_(deviation / weight.std())
