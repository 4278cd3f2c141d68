"""The expert feedforward in Triton: the gate is folded into the hidden, and the backward starts from one accumulator.

The up kernel stores gate · act(x W1). That one tensor feeds the down product, is the operand of dW2, and over the gate
gives back the hidden (its sign is the mask of relu), so the sum over experts needs no gates and the backward one saved
tensor. Other activations, and float16, also keep the pre-activation.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels import activation as activations
from moeut_kernels.plan import TILE_ROWS, n_tiles
from moeut_kernels.triton_gradients import weight_gradient
from moeut_kernels.triton_rows import (
    accumulate,
    activate,
    activation_slope,
    grouped_rows,
    ordered_rows,
    safe_gate,
    tile_rows,
)
from moeut_kernels.triton_sums import gather_sum, row_dots, segment_sum
from moeut_kernels.triton_tiles import block, rows_for, tile

_INNER = {"swiglu": "silu", "geglu": "gelu"}


def forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    routing: Sequence[Tensor],
    activation: str,
    save: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Body of `moeut::expert_feedforward`: output, gated hidden, pre-activation (the last two empty unless saved)."""
    x, up, down, gate = x.contiguous(), up.contiguous(), down.contiguous(), gate.contiguous()
    index, slots, position, _, tiles = routing
    n_tokens, _, top_k = index.shape
    keep_pre = save and (activation != "relu" or x.dtype == torch.float16)
    hidden, pre = grouped_rows(
        x, up, slots, tiles, per_row=top_k, bias=None if b_up is None else b_up.contiguous(),
        kind=_INNER.get(activation, activation), gated=activations.is_gated(activation), gate=gate, keep_pre=keep_pre,
    )  # fmt: skip
    products = ordered_rows(hidden, down, slots, tiles)
    bias = None if b_down is None else b_down.contiguous()
    out = gather_sum(
        products, position, n_tokens, top_k, bias=bias, bias_gate=gate, index=index.contiguous(),
        residual=None if residual is None else residual.contiguous(),
    )  # fmt: skip
    return out, hidden if save else x.new_empty(0), pre


@triton.jit
def _backward_hidden(
    grad, weight, hidden, pre, gate, d_pre, dots, slots, table,
    depth, n_slots, top_k: tl.constexpr, width: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, PRE: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From v = grad[token] @ W2ᵀ: the gradient of the pre-activation, and for each slot the gradient of its gate."""
    EVEN_WIDTH: tl.constexpr = width % COLUMNS == 0
    expert, first, stop = tile_rows(table, SPLIT, ROWS)
    if first >= stop:
        return
    row = first + tl.arange(0, ROWS)
    here = row < stop
    slot = tl.load(slots + row, mask=here, other=0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = n < width
    mask = here[:, None] if EVEN_WIDTH else here[:, None] & wide[None, :]
    n_pre = 2 * width if GATED else width
    saved_at = row.to(tl.int64)[:, None] * n_pre + n[None, :]
    # The saved tensor is asked for before the product, so that it arrives while the product runs.
    saved = tl.load((pre if PRE else hidden) + saved_at, mask=mask, other=0.0)
    g = tl.load(gate + slot, mask=here, other=1.0).to(tl.float32)
    k = tl.arange(0, DEPTH)
    a_at = grad + (slot // top_k).to(tl.int64)[:, None] * depth + k[None, :]
    b_at = weight + expert * depth * width + n[None, :] * depth + k[:, None]
    v = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            a = tl.load(a_at)
        else:
            a = tl.load(a_at, mask=(k < depth - at)[None, :], other=0.0)
        if EVEN_DEPTH and EVEN_WIDTH:
            b = tl.load(b_at)
        else:
            b = tl.load(b_at, mask=(k < depth - at)[:, None] & wide[None, :], other=0.0)
        v = accumulate(a, b, v)
        a_at += DEPTH
        b_at += DEPTH
    z = saved.to(tl.float32)
    d_type = d_pre.dtype.element_ty
    if GATED:
        value = tl.load(pre + saved_at + width, mask=mask, other=0.0).to(tl.float32)
        act = activate(z, KIND)
        dot = tl.sum(act * value * v, 1)
        gv = v * g[:, None]
        tl.store(d_pre + saved_at, (gv * value * activation_slope(z, KIND)).to(d_type), mask=mask)
        tl.store(d_pre + saved_at + width, (gv * act).to(d_type), mask=mask)
    elif PRE:
        dot = tl.sum(activate(z, KIND) * v, 1)
        tl.store(d_pre + saved_at, (v * g[:, None] * activation_slope(z, KIND)).to(d_type), mask=mask)
    else:
        # The hidden of relu is z over the gate: the gate divides the sum of a row, its sign makes the mask.
        dot = tl.sum(z * v, 1) / safe_gate(g)
        sign = tl.where(g < 0, -1.0, 1.0).to(saved.dtype)
        tl.store(
            d_pre + saved_at, tl.where(saved * sign[:, None] > 0, (v * g[:, None]).to(d_type), 0.0), mask=mask
        )
    tl.store(dots + tl.program_id(1).to(tl.int64) * n_slots + slot, dot, mask=here)


def backward_hidden(
    grad: Tensor,
    down: Tensor,
    gate: Tensor,
    hidden: Tensor,
    pre: Tensor,
    slots: Tensor,
    tiles: Tensor,
    top_k: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activation in expert order, [S, F or 2F], and of the gates in slot order, float32 [S]."""
    n_slots, (n_experts, width, depth) = slots.shape[0], down.shape
    gated = activations.is_gated(activation)
    d_pre = torch.empty(n_slots, 2 * width if gated else width, dtype=grad.dtype, device=grad.device)
    t = tile("gather_backward", grad)
    if pre.numel() or depth % t.depth or width % t.columns:
        t = tile("gather_backward_heavy", grad)
    n_columns, n_depth = block(width, t.columns), block(depth, t.depth)
    n_parts = triton.cdiv(width, n_columns)
    dots = torch.empty(n_parts, n_slots, dtype=torch.float32, device=grad.device)
    if n_slots == 0:
        return d_pre, dots.sum(0)
    n_rows = rows_for(n_slots, n_experts, t.rows)
    split = TILE_ROWS // n_rows
    _backward_hidden[(n_tiles(n_slots, n_experts) * split, n_parts)](
        grad, down, hidden, pre, gate, d_pre, dots, slots, tiles, depth, n_slots, top_k, width,
        _INNER.get(activation, activation), gated, pre.numel() > 0, depth % n_depth == 0,
        split, n_rows, n_columns, n_depth, **t.launch,
    )  # fmt: skip
    return d_pre, dots[0] if n_parts == 1 else dots.sum(0)


def backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    masters: tuple[Tensor, Tensor],
    gate: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    routing: Sequence[Tensor],
    hidden: Tensor,
    pre: Tensor,
    activation: str,
    wants: Sequence[bool],
    hand_in: bool,
    sum_x: bool,
) -> tuple[Tensor, ...]:
    """Body of `moeut::expert_feedforward_backward`: gradients of x, w_up, w_down, gate, b_up, b_down.

    masters: w_up and w_down, whose shapes and dtypes their gradients have; up and down may be padded. hand_in: return
    what a deferred gradient needs, too. Unless sum_x, the gradient of x comes in rows in expert order.
    """
    index, slots, position, offsets, tiles = routing
    grad, x, up, down, gate = (
        grad.contiguous(),
        x.contiguous(),
        up.contiguous(),
        down.contiguous(),
        gate.contiguous(),
    )
    want_x, want_up, want_down, want_gate, want_b_up, want_b_down = wants
    n_tokens, _, top_k = index.shape
    d_x, d_gate, d_b_up, d_b_down = (grad.new_empty(0) for _ in range(4))
    d_up = torch.empty(masters[0].shape if want_up else 0, dtype=masters[0].dtype, device=x.device)
    d_down = torch.empty(masters[1].shape if want_down else 0, dtype=masters[1].dtype, device=x.device)
    d_pre = grad.new_empty(0)
    if want_x or want_up or want_gate or want_b_up or hand_in:
        d_pre, dots = backward_hidden(grad, down, gate, hidden, pre, slots, tiles, top_k, activation)
    if want_down:
        weight_gradient([hidden], [grad], [slots], [offsets], per_left=None, per_right=top_k, out=d_down)
    if want_up:
        weight_gradient([x], [d_pre], [slots], [offsets], per_left=top_k, per_right=None, out=d_up)
    if want_x:
        d_x = ordered_rows(d_pre, up, slots, tiles, transposed=True)
        d_x = gather_sum(d_x, position, n_tokens, top_k) if sum_x else d_x
    if want_gate:
        if b_down is not None:
            tokens = torch.arange(n_tokens, dtype=torch.int32, device=x.device).repeat_interleave(top_k)
            dots = row_dots(b_down.contiguous(), grad, index.reshape(-1), tokens, dots)
        d_gate = dots.view(gate.shape).to(gate.dtype)
    if want_b_up:
        d_b_up = segment_sum(d_pre, slots, offsets, per_row=None, dtype=b_up.dtype)
    if want_b_down:
        d_b_down = segment_sum(grad, slots, offsets, per_row=top_k, dtype=b_down.dtype, gate=gate)
    d_rows = d_pre if hand_in else grad.new_empty(0)
    return d_x, d_up, d_down, d_gate, d_b_up, d_b_down, d_rows, grad.new_empty(0)
