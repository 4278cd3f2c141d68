"""Cross entropy of a linear head without ever holding all logits.

Tokens are taken in chunks. A chunk's logits live only until its loss and its gradients are known; what remains is one
gradient of the hidden states and one of the weight. The arithmetic is that of the plain loss: logits in the compute
dtype, softmax and sums in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeut_compose.blocks.precision import at_least_float32

IGNORED = -100
"""Targets with this value take no part."""

CHUNK = 4096
"""Tokens whose logits are held at once."""


LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `logits [N, V]` at `targets [N]`, and its gradient in the dtype of the logits.

    The gradient is softmax - one-hot, with zero rows for ignored tokens. One pass over the logits when compiled; on a
    CPU few passes, most of them in place.
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        return _loss_and_gradient_in_place(logits, targets)
    wide = at_least_float32(logits)
    counted = (targets != IGNORED)[:, None]
    wanted = targets.clamp_min(0)[:, None]
    spread = torch.logsumexp(wide, -1, keepdim=True)
    losses = spread - wide.gather(-1, wanted)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    gradient = ((wide - spread).exp() - (columns == wanted).to(wide.dtype)) * counted
    return (losses * counted).sum(), gradient.to(logits.dtype)


def _loss_and_gradient_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's fused log-softmax, which becomes the gradient where it lies."""
    logarithms = F.log_softmax(at_least_float32(logits), -1)
    counted = (targets != IGNORED)[:, None]
    wanted = targets.clamp_min(0)[:, None]
    loss = -(logarithms.gather(-1, wanted) * counted).sum()
    gradient = logarithms.exp_()
    gradient.scatter_add_(-1, wanted, gradient.new_full((), -1.0).expand(wanted.shape))
    return loss, gradient.mul_(counted).to(logits.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int = CHUNK,
    of_chunk: LossAndGradient = loss_and_gradient,
) -> Tensor:
    """Mean cross entropy in nats of logits `x @ weight.T + bias` at `targets`, a scalar of at least float32.

    x: [N, D]. weight: [V, D]. bias: [V] or None. targets: [N] integers, -100 to leave a token out. Without any
    target the mean is NaN, as in PyTorch. `of_chunk` may be a compiled `loss_and_gradient`.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, targets, chunk, of_chunk)
        return loss
    losses = [of_chunk(logits, wanted)[0] for _, logits, wanted in _chunks(x, weight, bias, targets, chunk)]
    return torch.stack(losses).sum() / (targets != IGNORED).sum()


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, logits and targets of one chunk after the other."""
    matrix = weight.to(x.dtype)
    offset = None if bias is None else bias.to(x.dtype)
    for part, wanted in zip(x.split(chunk), targets.split(chunk), strict=True):
        yield part, F.linear(part, matrix, offset), wanted


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        of_chunk: LossAndGradient,
    ) -> Tensor:
        matrix = weight.to(x.dtype)
        d_x = torch.empty_like(x)
        d_weight = torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        for place, (part, logits, wanted) in enumerate(_chunks(x, matrix, bias, targets, chunk)):
            loss, d_logits = of_chunk(logits, wanted)
            total += loss
            torch.mm(d_logits, matrix, out=d_x[place * chunk : place * chunk + part.shape[0]])
            d_weight += d_logits.t() @ part
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(d_x, d_weight, d_bias, (targets != IGNORED).sum())
        return total / (targets != IGNORED).sum()

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
            None,
        )
