"""Cross entropy of a linear head without ever holding all logits.

Tokens are taken in chunks. A chunk's logits live only until its loss and its gradients are known; what remains is one
gradient of the hidden states and one of the weight. The arithmetic is that of the plain loss: logits in the compute
dtype, softmax and sums in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeut_compose.blocks.precision import at_least_float32

IGNORED = -100
"""Targets with this value take no part."""

CHUNK = 4096
"""Tokens whose logits are held at once."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Mean cross entropy in nats of logits `x @ weight.T + bias` at `targets`, a scalar of at least float32.

    x: [N, D]. weight: [V, D]. bias: [V] or None. targets: [N] integers, -100 to leave a token out. Without any
    target the mean is NaN, as in PyTorch.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not torch.is_grad_enabled():
        losses = [_chunk_loss(*parts)[0] for parts in _chunks(x, weight, bias, targets, chunk)]
        return torch.stack(losses).sum() / (targets != IGNORED).sum()
    return _LinearCrossEntropy.apply(x, weight, bias, targets, chunk)


def _chunks(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Any:
    matrix = weight.to(x.dtype)
    offset = None if bias is None else bias.to(x.dtype)
    for part, wanted in zip(x.split(chunk), targets.split(chunk), strict=True):
        yield part, matrix, offset, wanted


def _chunk_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its logits."""
    logits = at_least_float32(F.linear(x, weight, bias))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), logits


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        n_targets = (targets != IGNORED).sum()
        d_x = torch.empty_like(x)
        d_weight = torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        for place, parts in enumerate(_chunks(x, weight, bias, targets, chunk)):
            part, matrix, _, wanted = parts
            loss, logits = _chunk_loss(*parts)
            total += loss
            d_logits = _logit_gradients(logits, wanted).to(x.dtype)
            d_x[place * chunk : place * chunk + part.shape[0]] = d_logits @ matrix
            d_weight += d_logits.t() @ part
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(d_x, d_weight, d_bias, n_targets)
        return total / n_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weight, d_bias, n_targets = ctx.saved_tensors
        grad = grads[0] / n_targets  # not earlier: with a loss scale, small float16 gradients survive only so
        return (
            d_x * grad.to(d_x.dtype),
            d_weight * grad.to(d_weight.dtype),
            None if d_bias is None else d_bias * grad.to(d_bias.dtype),
            None,
            None,
        )


def _logit_gradients(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed loss: softmax - one-hot, zero rows for ignored tokens."""
    probabilities = torch.softmax(logits, -1)
    counted = (targets != IGNORED)[:, None]
    rows = torch.arange(targets.shape[0], device=targets.device)
    probabilities[rows, targets.clamp_min(0)] -= 1.0
    return probabilities * counted
