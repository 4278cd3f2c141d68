"""Linear maps that may differ a little from pass to pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeut_compose.blocks.initialisation import normal_


class Lora(NamedTuple):
    """The size of low-rank changes."""

    rank: int
    n_repeats: int


class Linear(nn.Linear):
    """W x + b, or (W + U_r D_r) x + b in pass r (relaxed recursion, arXiv:2410.20672).

    `lora_down [R, rank, d_in]` and `lora_up [R, d_out, rank]` hold D and U; U starts at zero, so all passes
    begin equal.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool, lora: Lora | None = None) -> None:
        super().__init__(d_in, d_out, bias=bias)
        rank, n_repeats = lora or (0, 0)
        self.lora_down = nn.Parameter(torch.empty(n_repeats, rank, d_in)) if lora else None
        self.lora_up = nn.Parameter(torch.empty(n_repeats, d_out, rank)) if lora else None

    def reset_lora(self) -> None:
        """Draw the low-rank changes, if there are any; W and b are drawn by the block they belong to."""
        if self.lora_down is not None and self.lora_up is not None:
            normal_(self.lora_down, std=1.0 / math.sqrt(self.in_features))
            nn.init.zeros_(self.lora_up)

    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        y = super().forward(x)
        if self.lora_down is None or self.lora_up is None:
            return y
        return y + F.linear(F.linear(x, self.lora_down[repeat]), self.lora_up[repeat])


def joint_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x @ weight.T of `x [..., D]` and each of `weights [_, D]`, as one product.

    x is read once, and its gradient written once instead of once per weight. On a GPU odd sides get zeros: products
    want rows that begin at multiples of 16 bytes.
    """
    rows = [weight.shape[0] for weight in weights]
    matrix = torch.cat(weights)
    if x.is_cuda:
        odd_rows, odd_columns = -matrix.shape[0] % 8, -matrix.shape[1] % 8
        if odd_rows or odd_columns:
            matrix = F.pad(matrix, (0, odd_columns, 0, odd_rows))
            rows.append(odd_rows)
        if odd_columns:
            x = F.pad(x, (0, odd_columns))
    return F.linear(x, matrix).split(rows, dim=-1)[: len(weights)]
