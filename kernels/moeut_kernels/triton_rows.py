"""Grouped products in Triton: rows of one expert times that expert's matrix.

Rows are gathered inside the product (the grouped copy of the input never exists), and partial products are written
once in expert order, for `triton_sums` to gather. Products accumulate in float32.
Legend: S slots in expert order, E experts, D columns in, F columns out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.plan import CHUNK_ROWS, TILE_ROWS, n_tiles
from moeut_kernels.triton_tiles import block, offers, rows_for, tile

DEEPEST_WALK = 256
"""Most columns in of a walk: the slice of the weights has to stay in shared memory."""

CHUNK = tl.constexpr(CHUNK_ROWS)
SMALLEST_GATE = tl.constexpr(1e-30)
"""A gate nearer to zero is replaced by this in the stored gate · hidden, so that the division by the gate gives the
hidden back. Far below any rounding of float32 and bfloat16; float16 has no such number and keeps the pre-activation."""


@triton.jit
def safe_gate(gate):
    return tl.where(tl.abs(gate) < SMALLEST_GATE, SMALLEST_GATE, gate)


@triton.jit
def activate(z, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.maximum(z, 0.0)
    if KIND == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if KIND == "silu":
        return z * tl.sigmoid(z)
    return z


@triton.jit
def activation_slope(z, KIND: tl.constexpr):
    if KIND == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if KIND == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if KIND == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    return tl.where(z == z, 1.0, 1.0)


@triton.jit
def tile_rows(table, SPLIT: tl.constexpr, ROWS: tl.constexpr):
    """Expert, row numbers, and the end of this program's part of its table entry; an empty part where there is none."""
    part = tl.program_id(0) % SPLIT
    entry = table + 4 * (tl.program_id(0) // SPLIT)
    expert = tl.load(entry)
    first = tl.load(entry + 2) + part * ROWS
    stop = tl.minimum(tl.load(entry + 3), first + ROWS)
    stop = tl.where(expert < 0, first, stop)
    return expert.to(tl.int64), first, stop


@triton.jit
def accumulate(a, b, accumulator):
    """One step of a product; float32 operands are multiplied as float32, never as tf32."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _grouped_rows(
    rows, weight, bias, gate, out, pre, slots, table,
    depth, per_row: tl.constexpr, width: tl.constexpr,
    stride_expert: tl.constexpr, stride_depth: tl.constexpr, stride_width: tl.constexpr,
    GATHER: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, GATES: tl.constexpr, BIAS: tl.constexpr,
    PRE: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[r] = gate · activation(rows[r] @ weight[e] + bias[e]); GATED: times a second product, `width` columns on."""
    EVEN_WIDTH: tl.constexpr = width % COLUMNS == 0
    expert, first, stop = tile_rows(table, SPLIT, ROWS)
    if first >= stop:
        return
    row = first + tl.arange(0, ROWS)
    here = row < stop
    slot = tl.load(slots + row, mask=here, other=0)
    source = slot // per_row if GATHER else tl.where(here, row, first)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = n < width
    k = tl.arange(0, DEPTH)
    a_at = rows + source.to(tl.int64)[:, None] * depth + k[None, :]
    b_at = weight + expert * stride_expert + k[:, None] * stride_depth + n[None, :] * stride_width
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            a = tl.load(a_at)
        else:
            a = tl.load(a_at, mask=(k < depth - at)[None, :], other=0.0)
        if EVEN_DEPTH and EVEN_WIDTH:
            b = tl.load(b_at)
        else:
            b = tl.load(b_at, mask=(k < depth - at)[:, None] & wide[None, :], other=0.0)
        acc = accumulate(a, b, acc)
        if GATED:
            b_at2 = b_at + width * stride_width
            if EVEN_DEPTH and EVEN_WIDTH:
                b2 = tl.load(b_at2)
            else:
                b2 = tl.load(b_at2, mask=(k < depth - at)[:, None] & wide[None, :], other=0.0)
            second = accumulate(a, b2, second)
        a_at += DEPTH
        b_at += DEPTH * stride_depth
    mask = here[:, None] & wide[None, :]
    n_pre = 2 * width if GATED else width
    if BIAS:
        acc += tl.load(bias + expert * n_pre + n, mask=wide, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias + expert * n_pre + width + n, mask=wide, other=0.0).to(tl.float32)[None, :]
    if PRE:
        pre_at = pre + row.to(tl.int64)[:, None] * n_pre + n[None, :]
        tl.store(pre_at, acc.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(pre_at + width, second.to(pre.dtype.element_ty), mask=mask)
    hidden = activate(acc, KIND)
    if GATED:
        hidden *= second
    if GATES:
        g = tl.load(gate + slot, mask=here, other=0.0).to(tl.float32)
        if PRE:
            hidden *= g[:, None]
        else:
            hidden *= safe_gate(g)[:, None]
    tl.store(out + row.to(tl.int64)[:, None] * width + n[None, :], hidden.to(out.dtype.element_ty), mask=mask)


def grouped_rows(
    rows: Tensor, weight: Tensor, slots: Tensor, tiles: Tensor, *, per_row: int | None, transposed: bool = False,
    bias: Tensor | None = None, kind: str = "none", gated: bool = False, gate: Tensor | None = None,
    keep_pre: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows times the matrix of their expert, [S, F]; and the pre-activations, [S, F or 2F], where asked for.

    rows: [R, D], row slot // per_row for each slot; in expert order already where per_row is None. weight: [E, D, F'],
    or [E, F', D] where transposed. gate: one number per slot, multiplied in at the end.
    """
    n_slots, n_experts = slots.shape[0], weight.shape[0]
    depth, columns = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    width = columns // 2 if gated else columns
    out = torch.empty(n_slots, width, dtype=rows.dtype, device=rows.device)
    pre = torch.empty((n_slots, columns) if keep_pre else 0, dtype=rows.dtype, device=rows.device)
    if n_slots == 0 or width == 0:
        return out, pre
    t = tile("gather", rows)
    if keep_pre or gated or depth % t.depth or width % t.columns:
        t = tile("gather_heavy", rows)
    n_rows = rows_for(n_slots, n_experts, t.rows)
    n_columns, n_depth = block(width, t.columns // 2 if gated else t.columns), block(depth, t.depth)
    split = TILE_ROWS // n_rows
    stride_depth, stride_width = (1, depth) if transposed else (columns, 1)
    _grouped_rows[(n_tiles(n_slots, n_experts) * split, triton.cdiv(width, n_columns))](
        rows, weight, bias, gate, out, pre, slots, tiles,
        depth, per_row or 1, width, depth * columns, stride_depth, stride_width,
        per_row is not None, kind, gated, gate is not None, bias is not None, keep_pre, depth % n_depth == 0,
        split, n_rows, n_columns, n_depth, **t.launch,
    )  # fmt: skip
    return out, pre


@triton.jit
def _walk(
    rows, weight, out, table, depth: tl.constexpr, width: tl.constexpr,
    stride_expert: tl.constexpr, stride_depth: tl.constexpr, stride_width: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[r] = rows[r] @ weight[e]: a column slice of the weights is loaded once, the rows of the expert pass by."""
    EVEN_DEPTH: tl.constexpr = depth == DEPTH
    EVEN_WIDTH: tl.constexpr = width % COLUMNS == 0
    entry = table + 4 * tl.program_id(1)
    expert = tl.load(entry).to(tl.int64)
    if expert < 0:
        return
    first, stop = tl.load(entry + 2), tl.load(entry + 3)
    stop = tl.minimum(stop, first + CHUNK)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    deep, wide = k < depth, n < width
    b_at = weight + expert * stride_expert + k[:, None] * stride_depth + n[None, :] * stride_width
    if EVEN_DEPTH and EVEN_WIDTH:
        b = tl.load(b_at)
    else:
        b = tl.load(b_at, mask=deep[:, None] & wide[None, :], other=0.0)
    for at in tl.range(first, stop, ROWS, num_stages=STAGES):
        row = at + tl.arange(0, ROWS)
        here = row < stop
        a_at = rows + row.to(tl.int64)[:, None] * depth + k[None, :]
        if EVEN_DEPTH:
            a = tl.load(a_at, mask=here[:, None], other=0.0)
        else:
            a = tl.load(a_at, mask=here[:, None] & deep[None, :], other=0.0)
        product = tl.dot(a, b, input_precision="ieee")
        o_at = out + row.to(tl.int64)[:, None] * width + n[None, :]
        if EVEN_WIDTH:
            tl.store(o_at, product.to(out.dtype.element_ty), mask=here[:, None])
        else:
            tl.store(o_at, product.to(out.dtype.element_ty), mask=here[:, None] & wide[None, :])


def ordered_rows(
    rows: Tensor, weight: Tensor, slots: Tensor, tiles: Tensor, *, transposed: bool = False
) -> Tensor:
    """Rows in expert order times the matrix of their expert: [S, D] -> [S, F]. Made for few columns in, many out."""
    n_slots, n_experts = slots.shape[0], weight.shape[0]
    depth, width = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    few = rows_for(n_slots, n_experts, TILE_ROWS) < TILE_ROWS
    if few or depth > DEEPEST_WALK or not offers("walk", rows):
        return grouped_rows(rows, weight, slots, tiles, per_row=None, transposed=transposed)[0]
    t = tile("walk", rows)
    out = torch.empty(n_slots, width, dtype=rows.dtype, device=rows.device)
    columns, deep = block(width, t.columns), block(depth, DEEPEST_WALK)
    chunks = tiles[n_tiles(n_slots, n_experts) :]
    stride_depth, stride_width = (1, depth) if transposed else (width, 1)
    _walk[(triton.cdiv(width, columns), chunks.shape[0])](
        rows, weight, out, chunks, depth, width, depth * width, stride_depth, stride_width,
        t.rows, columns, deep, t.stages, num_warps=t.warps,
    )  # fmt: skip
    return out
