"""The optimiser and gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from moeut_compose.spec.recipe import OptimizerSpec


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW with all parameters in one group: norms, biases and embeddings decay too, as published."""
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda if spec.fused == "auto" else spec.fused
    return torch.optim.AdamW(
        parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=fused
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; return the norm before."""
    parameters = list(parameters)
    if max_norm is None:
        return get_total_norm([p.grad for p in parameters if p.grad is not None])
    return clip_grad_norm_(parameters, max_norm)
