"""SwitchHead projections by pairs of experts: a (token, group) item meets both of its experts in one program.

One gather, two accumulators, gates in the epilogue: no partial product per slot is ever written. Items lie in the order
of their pair (`Plan.low_slots`); rows that feed a weight gradient are left in expert order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.plan import CHUNK_ROWS, TILE_ROWS
from moeut_kernels.triton_rows import accumulate
from moeut_kernels.triton_tiles import block, tile

WIDEST_NARROW = 128
"""Most columns on the narrow side: a program holds whole rows of it, twice."""

CHUNK = tl.constexpr(CHUNK_ROWS)


@triton.jit
def _items(low_slots, first, stop, ROWS: tl.constexpr):
    """ROWS items from `first` on, their slots with the lower and the higher expert, and which of them exist."""
    row = first + tl.arange(0, ROWS)
    here = row < stop
    low = tl.load(low_slots + row, mask=here, other=0)
    return low // 2, low, low ^ 1, here


@triton.jit
def _load_gate(gate, slot, here, GATES: tl.constexpr):
    if GATES:
        return tl.load(gate + slot, mask=here, other=0.0).to(tl.float32)
    return tl.where(here, 1.0, 0.0)


@triton.jit
def _pair_narrow(
    rows, weight, gate, other, out, products, dots, ordered, low_slots, position, table,
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
    entry = table + 4 * (tl.program_id(0) // SPLIT)
    expert1, expert2 = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64)
    first, stop = tl.load(entry + 2) + tl.program_id(0) % SPLIT * ROWS, tl.load(entry + 3)
    if (expert1 < 0) | (first >= stop):
        return
    item, slot1, slot2, here = _items(low_slots, first, stop, ROWS)
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
    rows, weight, gate, products, out, dots, ordered, low_slots, position, table,
    depth: tl.constexpr, width: tl.constexpr, stride_depth: tl.constexpr, stride_width: tl.constexpr,
    GATES: tl.constexpr, BACKWARD: tl.constexpr, DOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[item] = g1 · rows[item] @ W1 + g2 · rows[item] @ W2, from few columns to many.

    A column slice of both matrices is loaded once, the items of the pair pass by. BACKWARD (of a split, `rows` its
    output gradient): the first program of a pair has no slice but writes gate · rows in expert order and, where
    `products` of the forward were kept (DOTS), the gate gradients.
    """
    EVEN_DEPTH: tl.constexpr = depth == DEPTH
    EVEN_WIDTH: tl.constexpr = width % COLUMNS == 0
    entry = table + 4 * tl.program_id(1)
    expert1, expert2 = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64)
    if expert1 < 0:
        return
    first, stop = tl.load(entry + 2), tl.load(entry + 3)
    stop = tl.minimum(stop, first + CHUNK)
    k = tl.arange(0, DEPTH)
    deep = k < depth
    if BACKWARD:  # noqa: SIM102 - this is known when the kernel is compiled, the next when it runs
        if tl.program_id(0) == 0:
            ty = ordered.dtype.element_ty
            for at in range(first, stop, ROWS):
                item, slot1, slot2, here = _items(low_slots, at, stop, ROWS)
                mask = here[:, None] if EVEN_DEPTH else here[:, None] & deep[None, :]
                x = tl.load(rows + item.to(tl.int64)[:, None] * depth + k[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
                if DOTS:
                    u_at = products + k[None, :]
                    u1 = tl.load(u_at + slot1.to(tl.int64)[:, None] * depth, mask=mask, other=0.0)
                    u2 = tl.load(u_at + slot2.to(tl.int64)[:, None] * depth, mask=mask, other=0.0)
                    tl.store(dots + slot1, tl.sum(x * u1.to(tl.float32), 1), mask=here)
                    tl.store(dots + slot2, tl.sum(x * u2.to(tl.float32), 1), mask=here)
                g1 = _load_gate(gate, slot1, here, GATES)
                g2 = _load_gate(gate, slot2, here, GATES)
                r1 = tl.load(position + slot1, mask=here, other=0).to(tl.int64)
                r2 = tl.load(position + slot2, mask=here, other=0).to(tl.int64)
                tl.store(ordered + r1[:, None] * depth + k[None, :], (x * g1[:, None]).to(ty), mask=mask)
                tl.store(ordered + r2[:, None] * depth + k[None, :], (x * g2[:, None]).to(ty), mask=mask)
            return
    part = tl.program_id(0) - 1 if BACKWARD else tl.program_id(0)
    n = part * COLUMNS + tl.arange(0, COLUMNS)
    wide = n < width
    b_at = k[:, None] * stride_depth + n[None, :] * stride_width
    b1_at = weight + expert1 * depth * width + b_at
    b2_at = weight + expert2 * depth * width + b_at
    if EVEN_DEPTH and EVEN_WIDTH:
        b1 = tl.load(b1_at)
        b2 = tl.load(b2_at)
    else:
        inside = deep[:, None] & wide[None, :]
        b1 = tl.load(b1_at, mask=inside, other=0.0)
        b2 = tl.load(b2_at, mask=inside, other=0.0)
    for at in tl.range(first, stop, ROWS, num_stages=STAGES):
        item, slot1, slot2, here = _items(low_slots, at, stop, ROWS)
        mask = here[:, None] if EVEN_DEPTH else here[:, None] & deep[None, :]
        a = tl.load(rows + item.to(tl.int64)[:, None] * depth + k[None, :], mask=mask, other=0.0)
        g1 = _load_gate(gate, slot1, here, GATES)
        g2 = _load_gate(gate, slot2, here, GATES)
        p1 = tl.dot(a, b1, input_precision="ieee")
        p2 = tl.dot(a, b2, input_precision="ieee")
        total = p1 * g1[:, None] + p2 * g2[:, None]
        tl.store(
            out + item.to(tl.int64)[:, None] * width + n[None, :],
            total.to(out.dtype.element_ty),
            mask=here[:, None] if EVEN_WIDTH else here[:, None] & wide[None, :],
        )


def _tables(pair_tiles: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """The table of tiles and that of chunks; every pair may add a ragged entry to each."""
    n_tiles, n_chunks = n_items // TILE_ROWS, n_items // CHUNK_ROWS
    n_ragged = (pair_tiles.shape[0] - n_tiles - n_chunks) // 2
    return pair_tiles[: n_tiles + n_ragged], pair_tiles[n_tiles + n_ragged :]


def narrow(
    rows: Tensor, weight: Tensor, gate: Tensor | None, low_slots: Tensor, position: Tensor, pair_tiles: Tensor, *,
    per_row: int, transposed: bool = False, keep: bool = False, other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Many columns to few: (sums [items, F], products by slot, gate gradients by slot, gate · other in expert order).

    rows: [R, D], row item // per_row of each item. weight: [E, D, F], or [E, F, D] where transposed. The last two are
    written where `other` [items, F] is given, the products where `keep`; empty otherwise.
    """
    depth, width = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    n_items = low_slots.shape[0]
    new = rows.new_empty
    out, products = new(n_items, width), new((2 * n_items, width) if keep else 0)
    dots = new(0 if other is None else 2 * n_items, dtype=torch.float32)
    ordered = new(0 if other is None else (2 * n_items, width))
    t = tile("pair_narrow" if other is None else "pair_narrow_backward", rows)
    columns, deep = block(width, WIDEST_NARROW), block(depth, t.depth)
    tiles, split = _tables(pair_tiles, n_items)[0], TILE_ROWS // t.rows
    stride_depth, stride_width = (1, depth) if transposed else (width, 1)
    if n_items:
        _pair_narrow[(tiles.shape[0] * split,)](
            rows, weight, gate, other, out, products, dots, ordered, low_slots, position, tiles,
            depth, per_row, width, stride_depth, stride_width,
            gate is not None, other is not None, keep, depth % deep == 0,
            split, t.rows, columns, deep, **t.launch,
        )  # fmt: skip
    return out, products, dots, ordered


def wide(
    rows: Tensor, weight: Tensor, gate: Tensor | None, low_slots: Tensor, position: Tensor, pair_tiles: Tensor, *,
    transposed: bool = False, products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Few columns to many: (sums [items, F], gate gradients by slot, gate · rows in expert order).

    rows: [items, D]. weight: [E, D, F], or [E, F, D] where transposed. The last two are written where `products` is
    given, what `narrow` kept of the forward; the gate gradients only if that is not empty.
    """
    depth, width = rows.shape[1], weight.shape[1] if transposed else weight.shape[2]
    n_items, backward = low_slots.shape[0], products is not None
    new = rows.new_empty
    out = new(n_items, width)
    dots = new(2 * n_items if backward else 0, dtype=torch.float32)
    ordered = new((2 * n_items, depth) if backward else 0)
    t = tile("pair_wide", rows)
    columns, deep = block(width, t.columns), block(depth, WIDEST_NARROW)
    chunks = _tables(pair_tiles, n_items)[1]
    stride_depth, stride_width = (1, depth) if transposed else (width, 1)
    if n_items:
        _pair_wide[(triton.cdiv(width, columns) + backward, chunks.shape[0])](
            rows, weight, gate, products, out, dots, ordered, low_slots, position, chunks,
            depth, width, stride_depth, stride_width,
            gate is not None, backward, backward and products.numel() > 0,
            t.rows, columns, deep, t.stages, num_warps=t.warps,
        )  # fmt: skip
    return out, dots, ordered
