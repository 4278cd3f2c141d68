"""Normalisation modules. Those of layers may have weights of their own for each pass, `[R, D]` instead of `[D]`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import moeut_kernels as mk
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module, ABC):
    """Normalisation over the last dimension."""

    eps: float
    centers: bool
    """Whether the mean is taken away."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set the weights to the identity."""

    @abstractmethod
    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        """Normalise `x [..., D]` with the weights of pass `repeat`."""

    @abstractmethod
    def affine(self, repeat: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[D]` and bias `[D]`, if there is one, of pass `repeat`."""

    def fan(
        self,
        x: Tensor | mk.Carried,
        repeat: int,
        *,
        addend: Tensor | None = None,
        shares: mk.ShareShape | None = None,
    ) -> mk.Fan:
        """The norm with all that lies around it in one pass, see `moeut_kernels.norm_fan`; `x [N, D]`."""
        weight, bias = self.affine(repeat)
        return mk.norm_fan(x, weight, bias, eps=self.eps, center=self.centers, addend=addend, shares=shares)


class LayerNorm(Norm):
    """Layer normalisation with weight and bias."""

    centers = True

    def __init__(self, d_model: int, *, eps: float, n_repeats: int | None = None) -> None:
        super().__init__()
        shape = (d_model,) if n_repeats is None else (n_repeats, d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def affine(self, repeat: int) -> tuple[Tensor, Tensor]:
        return _of_pass(self.weight, repeat), _of_pass(self.bias, repeat)

    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        weight, bias = self.affine(repeat)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class RMSNorm(Norm):
    """Root-mean-square normalisation with a weight."""

    centers = False

    def __init__(self, d_model: int, *, eps: float, n_repeats: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty((d_model,) if n_repeats is None else (n_repeats, d_model)))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def affine(self, repeat: int) -> tuple[Tensor, None]:
        return _of_pass(self.weight, repeat), None

    def forward(self, x: Tensor, repeat: int = 0) -> Tensor:
        weight, _ = self.affine(repeat)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def _of_pass(weight: Tensor, repeat: int) -> Tensor:
    return weight if weight.dim() == 1 else weight[repeat]


class Unscaled(nn.Module):
    """Layer normalisation without parameters, for embeddings."""

    def __init__(self, d_model: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.d_model = d_model
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,), eps=self.eps)
