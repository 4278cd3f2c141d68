"""Grouped products in Triton: rows of one expert times that expert's matrix, and weight gradients.

Rows are gathered inside the product (the grouped copy of the input never exists), and partial products are written
once in expert order, for `triton_sums` to gather. Products accumulate in float32.
Legend: S slots in expert order, E experts, D columns in, F columns out.
"""

from collections.abc import Sequence

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


@triton.jit
def _weight_gradient(
    lefts, rights, gate, out, slot_lists, offset_lists, per_left: tl.constexpr, per_right: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, stride_left: tl.constexpr, stride_right: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, GATES: tl.constexpr, TRANSPOSED: tl.constexpr,
    USES: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[u, e] = sum over TOGETHER uses, over the rows of e, of left[r]ᵀ (gate · right[r]): a program per tile of it.

    Rows may be longer than the matrix is wide: what lies beyond is read and left out. TRANSPOSED stores the transposed
    sum. GROUP tiles of a matrix run before those of the next expert.
    """
    EVEN: tl.constexpr = stride_left % ROWS == 0 and stride_right % COLUMNS == 0
    n_across: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(1)
    part = tl.program_id(2) % GROUPS * GROUP + tl.program_id(0)
    out += (tl.program_id(2) // GROUPS).to(tl.int64) * tl.num_programs(1) * height * width
    first_use = tl.program_id(2) // GROUPS * TOGETHER
    m = part // n_across * ROWS + tl.arange(0, ROWS)
    n = part % n_across * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for use in range(first_use, tl.minimum(first_use + TOGETHER, USES)):
        left, right, slots, offsets = lefts[0], rights[0], slot_lists[0], offset_lists[0]
        for other in tl.static_range(1, USES):
            left = tl.where(use == other, lefts[other], left)
            right = tl.where(use == other, rights[other], right)
            slots = tl.where(use == other, slot_lists[other], slots)
            offsets = tl.where(use == other, offset_lists[other], offsets)
        stop = tl.load(offsets + expert + 1)
        for at in range(tl.load(offsets + expert), stop, DEPTH):
            row = at + tl.arange(0, DEPTH)
            here = row < stop
            slot = tl.load(slots + row, mask=here, other=0)
            a_row = (slot // per_left if GATHER_LEFT else row).to(tl.int64)
            b_row = (slot // per_right if GATHER_RIGHT else row).to(tl.int64)
            a_mask = here[:, None] if EVEN else here[:, None] & (m < stride_left)[None, :]
            b_mask = here[:, None] if EVEN else here[:, None] & (n < stride_right)[None, :]
            a = tl.load(left + a_row[:, None] * stride_left + m[None, :], mask=a_mask, other=0.0)
            b = tl.load(right + b_row[:, None] * stride_right + n[None, :], mask=b_mask, other=0.0)
            if GATES:
                g = tl.load(gate + slot, mask=here, other=0.0).to(tl.float32)
                b = (b.to(tl.float32) * g[:, None]).to(b.dtype)
            acc = accumulate(tl.trans(a), b, acc)
    high, wide = m < height, n < width
    if TRANSPOSED:
        o_at = out + expert.to(tl.int64) * height * width + n[:, None] * height + m[None, :]
        tl.store(o_at, tl.trans(acc).to(out.dtype.element_ty), mask=wide[:, None] & high[None, :])
    else:
        o_at = out + expert.to(tl.int64) * height * width + m[:, None] * width + n[None, :]
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=high[:, None] & wide[None, :])


MOST_PARTS = {"weight": 4, "weight_uses": 8}
"""Tiles of 128 x 128 of a matrix that run before the next expert: with more, the gathered columns outgrow the cache."""


FEWEST_PROGRAMS = 2048
"""With fewer, an expert that has many rows holds up all others: uses are then added up by separate programs."""


def weight_gradient(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], slots: Sequence[Tensor], offsets: Sequence[Tensor], *,
    per_left: int | None, per_right: int | None, out: Tensor, gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of outer products of each expert's rows over all uses into out [E, D, F].

    Row slot // per_* of a side belongs to a slot; None: rows lie in expert order.

    A use is one entry of each sequence: left [R, D'] and right [R', F'] with D' >= D and F' >= F, slots [S] and offsets
    [E + 1]. A gathered right side changes places with an ordered left one: the compiler fits three programs on a
    multiprocessor that way, two the other way. gate goes with a single use.
    """
    n_experts, height, width = out.shape if out.dim() == 3 else (0, 0, 0)
    if out.numel() == 0:
        return out
    swapped = per_left is None and per_right is not None
    if swapped:
        lefts, rights, per_left, per_right, height, width = rights, lefts, per_right, per_left, width, height
    n_uses = len(lefts)
    product = "weight" if n_uses == 1 else "weight_uses"
    t = tile(product, lefts[0])
    most_rows, most_columns = (t.rows, t.columns) if height >= width else (t.columns, t.rows)
    n_rows, n_columns = block(height, most_rows), block(width, most_columns)
    n_parts = triton.cdiv(height, n_rows) * triton.cdiv(width, n_columns)
    most_parts = max(1, MOST_PARTS[product] * 128 * 128 // (n_rows * n_columns))
    group = next(size for size in range(min(most_parts, n_parts), 0, -1) if n_parts % size == 0)
    together = max(1, n_uses * n_parts * n_experts // FEWEST_PROGRAMS)
    n_sums = triton.cdiv(n_uses, together)
    sums = out if n_sums == 1 else torch.empty(n_sums, *out.shape, dtype=torch.float32, device=out.device)
    _weight_gradient[(group, n_experts, n_parts // group * n_sums)](
        tuple(lefts), tuple(rights), gate, sums, tuple(slots), tuple(offsets), per_left or 1, per_right or 1,
        height, width, lefts[0].shape[1], rights[0].shape[1],
        per_left is not None, per_right is not None, gate is not None, swapped,
        n_uses, min(together, n_uses), group, n_parts // group, n_rows, n_columns, t.depth, **t.launch,
    )  # fmt: skip
    return out if n_sums == 1 else out.copy_(sums.sum(0))
