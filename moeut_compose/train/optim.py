"""The optimiser and gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import get_total_norm

from moeut_compose.train.parallel import norm_of_whole, own_part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from moeut_compose.spec.recipe import OptimizerSpec


class AdamW(torch.optim.AdamW):
    """AdamW that updates what this process holds of each weight.

    The update is elementwise, so parts need nothing of each other, and plain tensors cost the host less than split
    ones.
    """

    def _init_group(self, group: dict[str, Any], *tensors: list[Tensor]) -> bool:
        is_complex: bool = super()._init_group(group, *tensors)
        for some in tensors:
            some[:] = map(own_part, some)
        return is_complex


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> AdamW:
    """AdamW with all parameters in one group: norms, biases and embeddings decay too, as published."""
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda if spec.fused == "auto" else spec.fused
    return AdamW(
        parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=fused
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; return the norm before.

    It is the norm of whole gradients, also where they are split over processes.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [own_part(gradient) for gradient in gradients]
    norm = get_total_norm(parts)
    if not gradients:
        return norm
    norm = norm_of_whole(norm, gradients[0])
    if max_norm is not None:
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
