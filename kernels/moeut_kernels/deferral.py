"""Weight gradients of a layer that runs several times: formed once, from the rows of all its uses.

Summing the gradients of nine uses reads and writes a float32 matrix nine times over; one product over nine times the
rows writes it once. A use therefore hands its rows to the weight instead of a gradient. What it hands over travels as
the gradient of placeholders, so that PyTorch waits for the last use and the weight still gets one ordinary gradient.
Legend: E experts, D columns in, F columns out, S slots of a use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeut_kernels import reference
from moeut_kernels.backend import resolve

_SCHEMA = (
    "(Tensor[] lefts, Tensor[] rights, Tensor[] slots, Tensor[] offsets, SymInt[] shape, int per_left, int per_right,"
    " ScalarType dtype, str backend) -> Tensor"
)


class Ticket(NamedTuple):
    """Placeholders of one use of one weight, without memory of their own. Each is to be used once.

    Their gradients: left [R, D'] and right [R', F'] rows of the weight's outer products, D' >= D and F' >= F; slots [S]
    and offsets [E + 1] of the plan, as float32 with the bits of the integers.
    """

    left: Tensor
    right: Tensor
    slots: Tensor
    offsets: Tensor


def defer(
    weight: Tensor, n_uses: int, *, left: tuple[int, int], right: tuple[int, int], dtype: torch.dtype,
    n_slots: int, per_left: int | None, per_right: int | None,
) -> list[Ticket]:  # fmt: skip
    """A ticket for each use of `weight` [E, D, F], whose gradient is formed when all have handed in their rows.

    left, right: shapes of the rows that a use hands in, in `dtype`. Row slot // per_left of the left and slot //
    per_right of the right belong together; None: rows lie in expert order.
    """
    shapes = (left, right, (n_slots,), (weight.shape[0] + 1,))
    placeholders = _Deferred.apply(weight, n_uses, shapes, dtype, per_left or 0, per_right or 0)
    return [Ticket(*placeholders[first : first + 4]) for first in range(0, 4 * n_uses, 4)]


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        n_uses: int,
        shapes: tuple,
        dtype: torch.dtype,
        per_left: int,
        per_right: int,
    ) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype, ctx.per = weight.shape, weight.dtype, (per_left, per_right)
        ctx.set_materialize_grads(False)
        row = torch.zeros((), dtype=dtype, device=weight.device)
        bits = row if dtype == torch.float32 else torch.zeros((), dtype=torch.float32, device=weight.device)
        parts = tuple(zip((row, row, bits, bits), shapes, strict=True))
        return tuple(number.expand(shape) for _ in range(n_uses) for number, shape in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *messages: Tensor | None) -> tuple[Tensor | None, ...]:
        uses = [messages[first : first + 4] for first in range(0, len(messages), 4)]
        handed_in = [use for use in uses if use[0] is not None]
        if not handed_in:
            return (None,) * 6
        lefts, rights, slots, offsets = (list(part) for part in zip(*handed_in, strict=True))
        gradient = torch.ops.moeut.deferred_gradient(
            lefts, rights, [as_integers(s) for s in slots], [as_integers(o) for o in offsets],
            ctx.shape, *ctx.per, ctx.dtype, resolve(lefts[0]),
        )  # fmt: skip
        return gradient, *(None,) * 5


def as_message(integers: Tensor) -> Tensor:
    """The bits of an int32 tensor as float32, in its memory: only such tensors can be gradients."""
    return integers.contiguous().view(torch.float32)


def as_integers(message: Tensor) -> Tensor:
    """The int32 tensor whose bits a message holds, in its memory."""
    return message.contiguous().view(torch.int32)


def _gradient(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], slots: Sequence[Tensor], offsets: Sequence[Tensor],
    shape: Sequence[int], per_left: int, per_right: int, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    if backend == "triton":
        from moeut_kernels.triton_gradients import weight_gradient

        out = torch.empty(shape, dtype=dtype, device=lefts[0].device)
        lefts, rights = [left.contiguous() for left in lefts], [right.contiguous() for right in rights]
        return weight_gradient(
            lefts, rights, slots, offsets, per_left=per_left or None, per_right=per_right or None, out=out
        )
    total = torch.zeros(shape, dtype=dtype, device=lefts[0].device)
    for left, right, order, starts in zip(lefts, rights, slots, offsets, strict=True):
        left = left.index_select(0, order // per_left) if per_left else left
        right = right.index_select(0, order // per_right) if per_right else right
        total += reference.grouped_outer(left, right, starts, backend)[:, : shape[1], : shape[2]]
    return total


_op = torch.library.custom_op("moeut::deferred_gradient", _gradient, mutates_args=(), schema=_SCHEMA)


@_op.register_fake
def _(lefts, rights, slots, offsets, shape, per_left, per_right, dtype, backend):  # type: ignore[no-untyped-def]
    return lefts[0].new_empty(shape, dtype=dtype)


@register_flop_formula(torch.ops.moeut.deferred_gradient)
def _flops(lefts: Any, rights: Any, slots: Any, offsets: Any, shape: Any, *_: Any, **__: Any) -> int:
    return 2 * sum(math.prod(of_use) for of_use in slots) * shape[1] * shape[2]
