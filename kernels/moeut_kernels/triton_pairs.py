"""SwitchHead projections by pairs of experts: a (token, group) item meets both of its experts in one program.

One gather, two accumulators, gates in the epilogue: no partial product per slot is ever written. Items lie in the order
of their pair (`Plan.items`); rows that feed a weight gradient are left in expert order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.plan import TILE_ROWS
from moeut_kernels.triton_rows import accumulate
from moeut_kernels.triton_tiles import block, tile

WIDEST_NARROW = 128
"""Most columns on the narrow side: a program holds whole rows of it, twice."""


@triton.jit
def _items_of(table, items, index, program, SPLIT: tl.constexpr, ROWS: tl.constexpr):
    """Both experts, the items, their slots with the lower and the higher expert, and which rows exist."""
    entry = table + 4 * (program // SPLIT)
    low, high = tl.load(entry), tl.load(entry + 1)
    first = tl.load(entry + 2) + program % SPLIT * ROWS
    stop = tl.where(low < 0, first, tl.load(entry + 3))
    row = first + tl.arange(0, ROWS)
    here = row < stop
    item = tl.load(items + row, mask=here, other=0)
    swapped = tl.load(index + 2 * item, mask=here, other=0) > tl.load(
        index + 2 * item + 1, mask=here, other=0
    )
    low_slot = 2 * item + swapped.to(tl.int32)
    high_slot = 2 * item + 1 - swapped.to(tl.int32)
    return low.to(tl.int64), high.to(tl.int64), item, low_slot, high_slot, here, first < stop


@triton.jit
def _load_gate(gate, slot, here, GATES: tl.constexpr):
    if GATES:
        return tl.load(gate + slot, mask=here, other=0.0).to(tl.float32)
    return tl.where(here, 1.0, 0.0)


@triton.jit
def _pair_narrow(
    rows, weight, gate, other, out, products, dots, ordered, items, index, position, table,
    depth, per_row: tl.constexpr, width: tl.constexpr,
    stride_depth: tl.constexpr, stride_width: tl.constexpr,
    GATES: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[item] = g1 · rows[item // per_row] @ W1 + g2 · ... @ W2, from many columns to few.

    KEEP writes both products by slot. BACKWARD (of a merge, `other` its input) also writes the gate gradients and
    gate · other in expert order.
    """
    EVEN_WIDTH: tl.constexpr = width == COLUMNS
    expert1, expert2, item, slot1, slot2, here, some = _items_of(
        table, items, index, tl.program_id(0), SPLIT, ROWS
    )
    if not some:
        return
    n = tl.arange(0, COLUMNS)
    mask = here[:, None] if EVEN_WIDTH else here[:, None] & (n < width)[None, :]
    out_at = item.to(tl.int64)[:, None] * width + n[None, :]
    if BACKWARD:
        # Asked for before the product, so that it arrives while the product runs.
        early = tl.load(other + out_at, mask=mask, other=0.0)
    k = tl.arange(0, DEPTH)
    a_at = rows + (item // per_row).to(tl.int64)[:, None] * depth + k[None, :]
    b_at = k[:, None] * stride_depth + n[None, :] * stride_width
    b1_at = weight + expert1 * depth * width + b_at
    b2_at = weight + expert2 * depth * width + b_at
    p1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    p2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, depth, DEPTH):
        if EVEN_DEPTH:
            a = tl.load(a_at)
        else:
            a = tl.load(a_at, mask=(k < depth - at)[None, :], other=0.0)
        if EVEN_DEPTH and EVEN_WIDTH:
            b1 = tl.load(b1_at)
            b2 = tl.load(b2_at)
        else:
            inside = (k < depth - at)[:, None] & (n < width)[None, :]
            b1 = tl.load(b1_at, mask=inside, other=0.0)
            b2 = tl.load(b2_at, mask=inside, other=0.0)
        p1 = accumulate(a, b1, p1)
        p2 = accumulate(a, b2, p2)
        a_at += DEPTH
        b1_at += DEPTH * stride_depth
        b2_at += DEPTH * stride_depth
    g1 = _load_gate(gate, slot1, here, GATES)
    g2 = _load_gate(gate, slot2, here, GATES)
    tl.store(out + out_at, (p1 * g1[:, None] + p2 * g2[:, None]).to(out.dtype.element_ty), mask=mask)
    if KEEP:
        ty = products.dtype.element_ty
        tl.store(products + slot1.to(tl.int64)[:, None] * width + n[None, :], p1.to(ty), mask=mask)
        tl.store(products + slot2.to(tl.int64)[:, None] * width + n[None, :], p2.to(ty), mask=mask)
    if BACKWARD:
        ty = ordered.dtype.element_ty
        x = early.to(tl.float32)
        if GATES:
            tl.store(dots + slot1, tl.sum(x * p1, 1), mask=here)
            tl.store(dots + slot2, tl.sum(x * p2, 1), mask=here)
        r1 = tl.load(position + slot1, mask=here, other=0).to(tl.int64)
        r2 = tl.load(position + slot2, mask=here, other=0).to(tl.int64)
        tl.store(ordered + r1[:, None] * width + n[None, :], (x * g1[:, None]).to(ty), mask=mask)
        tl.store(ordered + r2[:, None] * width + n[None, :], (x * g2[:, None]).to(ty), mask=mask)


@triton.jit
def _pair_wide(
    rows, weight, gate, products, out, dots, ordered, items, index, position, table,
    depth: tl.constexpr, width: tl.constexpr, stride_depth: tl.constexpr, stride_width: tl.constexpr,
    GATES: tl.constexpr, BACKWARD: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[item] = g1 · rows[item] @ W1 + g2 · rows[item] @ W2, from few columns to many; a program does SPAN columns.

    BACKWARD (of a split, `rows` its output gradient, `products` what it kept) also writes the gate gradients and
    gate · rows in expert order.
    """
    EVEN_DEPTH: tl.constexpr = depth == DEPTH
    EVEN_WIDTH: tl.constexpr = width % SPAN == 0
    expert1, expert2, item, slot1, slot2, here, some = _items_of(
        table, items, index, tl.program_id(1), SPLIT, ROWS
    )
    if not some:
        return
    k = tl.arange(0, DEPTH)
    deep = k < depth
    mask = here[:, None] if EVEN_DEPTH else here[:, None] & deep[None, :]
    a = tl.load(rows + item.to(tl.int64)[:, None] * depth + k[None, :], mask=mask, other=0.0)
    g1 = _load_gate(gate, slot1, here, GATES)
    g2 = _load_gate(gate, slot2, here, GATES)
    first = tl.program_id(0) * SPAN
    for at in range(first, first + SPAN, COLUMNS):
        n = at + tl.arange(0, COLUMNS)
        b_at = k[:, None] * stride_depth + n[None, :] * stride_width
        b1_at = weight + expert1 * depth * width + b_at
        b2_at = weight + expert2 * depth * width + b_at
        if EVEN_DEPTH and EVEN_WIDTH:
            b1 = tl.load(b1_at)
            b2 = tl.load(b2_at)
        else:
            inside = deep[:, None] & (n < width)[None, :]
            b1 = tl.load(b1_at, mask=inside, other=0.0)
            b2 = tl.load(b2_at, mask=inside, other=0.0)
        p1 = tl.dot(a, b1, input_precision="ieee")
        p2 = tl.dot(a, b2, input_precision="ieee")
        total = p1 * g1[:, None] + p2 * g2[:, None]
        out_mask = here[:, None] if EVEN_WIDTH else here[:, None] & (n < width)[None, :]
        tl.store(
            out + item.to(tl.int64)[:, None] * width + n[None, :],
            total.to(out.dtype.element_ty),
            mask=out_mask,
        )
    if BACKWARD:  # noqa: SIM102 - this is known when the kernel is compiled, the next when it runs
        if tl.program_id(0) == 0:
            x = a.to(tl.float32)
            if GATES:
                u1 = tl.load(
                    products + slot1.to(tl.int64)[:, None] * depth + k[None, :], mask=mask, other=0.0
                )
                u2 = tl.load(
                    products + slot2.to(tl.int64)[:, None] * depth + k[None, :], mask=mask, other=0.0
                )
                tl.store(dots + slot1, tl.sum(x * u1.to(tl.float32), 1), mask=here)
                tl.store(dots + slot2, tl.sum(x * u2.to(tl.float32), 1), mask=here)
            r1 = tl.load(position + slot1, mask=here, other=0).to(tl.int64)
            r2 = tl.load(position + slot2, mask=here, other=0).to(tl.int64)
            ty = ordered.dtype.element_ty
            tl.store(ordered + r1[:, None] * depth + k[None, :], (x * g1[:, None]).to(ty), mask=mask)
            tl.store(ordered + r2[:, None] * depth + k[None, :], (x * g2[:, None]).to(ty), mask=mask)


def narrow(
    rows: Tensor, weight: Tensor, gate: Tensor | None, index: Tensor, position: Tensor, items: Tensor,
    pair_tiles: Tensor, *, per_row: int, transposed: bool = False, keep: bool = False, other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Many columns to few: (sums [items, F], products by slot, gate gradients by slot, gate · other in expert order).

    rows: [R, D], row item // per_row of each item. weight: [E, D, F], or [E, F, D] where transposed. The last two are
    written where `other` [items, F] is given, the products where `keep`; empty otherwise.
    """
    depth, width = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    n_items = items.shape[0]
    new = rows.new_empty
    out, products = new(n_items, width), new((2 * n_items, width) if keep else 0)
    dots = new(0 if other is None else 2 * n_items, dtype=torch.float32)
    ordered = new(0 if other is None else (2 * n_items, width))
    t = tile("pair_narrow" if other is None else "pair_narrow_backward", rows)
    columns, deep = block(width, WIDEST_NARROW), block(depth, t.depth)
    split = TILE_ROWS // t.rows
    stride_depth, stride_width = (1, depth) if transposed else (width, 1)
    if n_items:
        _pair_narrow[(pair_tiles.shape[0] * split,)](
            rows, weight, gate, other, out, products, dots, ordered, items, index, position, pair_tiles,
            depth, per_row, width, stride_depth, stride_width,
            gate is not None, other is not None, keep, depth % deep == 0,
            split, t.rows, columns, deep, **t.launch,
        )  # fmt: skip
    return out, products, dots, ordered


def wide(
    rows: Tensor, weight: Tensor, gate: Tensor | None, index: Tensor, position: Tensor, items: Tensor,
    pair_tiles: Tensor, *, transposed: bool = False, products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Few columns to many: (sums [items, F], gate gradients by slot, gate · rows in expert order).

    rows: [items, D]. weight: [E, D, F], or [E, F, D] where transposed. The last two are written where `products` is
    given, what `narrow` kept of the forward (empty without gates); empty otherwise.
    """
    depth, width = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    n_items = items.shape[0]
    new = rows.new_empty
    out, backward = new(n_items, width), products is not None
    dots = new(2 * n_items if backward else 0, dtype=torch.float32)
    ordered = new((2 * n_items, depth) if backward else 0)
    t = tile("pair_wide", rows)
    columns, deep, split = block(width, t.columns), block(depth, WIDEST_NARROW), TILE_ROWS // t.rows
    span = max(columns, min(t.depth, triton.cdiv(width, columns) * columns))
    stride_depth, stride_width = (1, depth) if transposed else (width, 1)
    if n_items:
        _pair_wide[(triton.cdiv(width, span), pair_tiles.shape[0] * split)](
            rows, weight, gate, products, out, dots, ordered, items, index, position, pair_tiles,
            depth, width, stride_depth, stride_width,
            gate is not None, backward,
            split, t.rows, columns, span, deep, **t.launch,
        )  # fmt: skip
    return out, dots, ordered
