"""Normalisation modules."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension."""


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension."""


class Unscaled(nn.Module):
    """Layer normalisation without parameters, for embeddings."""

    def __init__(self, d_model: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.d_model = d_model
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,), eps=self.eps)
