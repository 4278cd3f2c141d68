"""Weight gradients in Triton: for every expert the sum of outer products of its rows, over one or several uses.

One program makes one tile of a matrix. Where experts are few, one with many rows would hold up all others: then uses
are added up by separate programs, and their sums in order, so bit for bit the same each time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.triton_rows import accumulate
from moeut_kernels.triton_tiles import block, tile

MOST_PARTS = {"one": 8, "apart": 8, "together": 12}
"""Tiles of 128 x 128 of a matrix that run before the next expert, for one use, and for several that are added up by
separate programs or by one: with fewer, ordered rows come from memory again, with more, gathered ones do."""

FEWEST_PROGRAMS = 2048
"""With fewer programs than this, uses are added up by separate ones."""

FEWEST_TOGETHER = 4
"""Uses that one program adds up at least: four, four and one of nine leave short programs to fill the end."""


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
    together = max(FEWEST_TOGETHER, n_uses * n_parts * n_experts // FEWEST_PROGRAMS)
    n_sums = triton.cdiv(n_uses, together)
    most_parts = MOST_PARTS["one" if n_uses == 1 else "together" if n_sums == 1 else "apart"]
    most_parts = max(1, most_parts * 128 * 128 // (n_rows * n_columns))
    group = next(size for size in range(min(most_parts, n_parts), 0, -1) if n_parts % size == 0)
    sums = out if n_sums == 1 else torch.empty(n_sums, *out.shape, dtype=torch.float32, device=out.device)
    _weight_gradient[(group, n_experts, n_parts // group * n_sums)](
        tuple(lefts), tuple(rights), gate, sums, tuple(slots), tuple(offsets), per_left or 1, per_right or 1,
        height, width, lefts[0].shape[1], rights[0].shape[1],
        per_left is not None, per_right is not None, gate is not None, swapped,
        n_uses, min(together, n_uses), group, n_parts // group, n_rows, n_columns, t.depth, **t.launch,
    )  # fmt: skip
    if n_sums == 1:
        return out
    return torch.sum(sums, 0, out=out) if out.dtype == sums.dtype else out.copy_(sums.sum(0))
