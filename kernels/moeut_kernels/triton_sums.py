"""Sums in Triton: over the slots of an output row, over the rows of an expert, and dot products of listed rows.

Every sum gathers in a fixed order: no atomics, so results repeat bit for bit. All add up in float32.
Legend: S slots in expert order, E experts, F columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.triton_tiles import block, interpreted


@triton.jit
def _gather_sum(
    rows, position, gate, index, bias, residual, out, n_out, width: tl.constexpr,
    GATHER: tl.constexpr, GATES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TERMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[o] = (residual[o] +) sum over j of gate · rows[position[o, j]] (+ gate · bias[index[o, j]]), in float32."""
    o = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = o < n_out
    mask = here[:, None] & (n < width)[None, :]
    at_out = o[:, None] * width + n[None, :]
    if RESIDUAL:
        total = tl.load(residual + at_out, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in tl.static_range(TERMS):
        at = o * TERMS + j
        source = tl.load(position + at, mask=here, other=0).to(tl.int64) if GATHER else at
        term = tl.load(rows + source[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATES:
            term *= tl.load(gate + at, mask=here, other=0.0).to(tl.float32)[:, None]
        total += term
        if BIAS:
            expert = tl.load(index + at, mask=here, other=0).to(tl.int64)
            shift = tl.load(bias + expert[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
            total += shift * tl.load(gate + at, mask=here, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=mask)


def _sum_columns(width: int) -> int:
    """Columns of a sum: up to 1024, and a divisor of the width where that is at least 256."""
    divisor = min(width & -width, 1024)
    return divisor if divisor >= 256 else min(1024, triton.next_power_of_2(width))


def gather_sum(
    rows: Tensor, position: Tensor | None, n_out: int, terms: int, gate: Tensor | None = None,
    bias: Tensor | None = None, bias_gate: Tensor | None = None, index: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum `terms` rows for each of `n_out` outputs; rows lie in order where position is None.

    gate weighs the rows. bias [E, F] is added once per term, weighed by bias_gate, of the term's expert in `index`.
    residual [n_out, F] is added once, and its dtype is that of the result.
    """
    width = rows.shape[1]
    dtype = rows.dtype if residual is None else residual.dtype
    out = torch.empty(n_out, width, dtype=dtype, device=rows.device)
    if n_out and width:
        columns, n_rows = _sum_columns(width), 16 if interpreted() else 1
        _gather_sum[(triton.cdiv(n_out, n_rows), triton.cdiv(width, columns))](
            rows, position, gate if bias is None else bias_gate, index, bias, residual, out, n_out, width,
            position is not None, gate is not None, bias is not None, residual is not None, terms, n_rows, columns,
            num_warps=4 if columns >= 512 else 1,
        )  # fmt: skip
    return out


@triton.jit
def _segment_sum(
    rows, gate, out, slots, offsets, per_row: tl.constexpr, width: tl.constexpr,
    GATHER: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows of e of gate · rows[r]."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    stop = tl.load(offsets + expert + 1)
    for at in range(tl.load(offsets + expert), stop, ROWS):
        row = at + tl.arange(0, ROWS)
        here = row < stop
        slot = tl.load(slots + row, mask=here, other=0)
        source = (slot // per_row if GATHER else row).to(tl.int64)
        mask = here[:, None] & (n < width)[None, :]
        term = tl.load(rows + source[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATES:
            term *= tl.load(gate + slot, mask=here, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(term, 0)
    tl.store(out + expert.to(tl.int64) * width + n, total.to(out.dtype.element_ty), mask=n < width)


def segment_sum(
    rows: Tensor,
    slots: Tensor,
    offsets: Tensor,
    *,
    per_row: int | None,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Sum of each expert's rows, [E, F] in `dtype`: the gradient of a bias."""
    n_experts, width = offsets.shape[0] - 1, rows.shape[1]
    out = torch.empty(n_experts, width, dtype=dtype, device=rows.device)
    columns = block(width, 64)
    if width:
        _segment_sum[(n_experts, triton.cdiv(width, columns))](
            rows,
            gate,
            out,
            slots,
            offsets,
            per_row or 1,
            width,
            per_row is not None,
            gate is not None,
            32,
            columns,
        )
    return out


@triton.jit
def _row_dots(
    left, right, left_row, right_row, before, out, n_rows, width: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[i] = left[left_row[i]] · right[right_row[i]] (+ before[i]), in float32."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = i < n_rows
    a_row = tl.load(left_row + i, mask=here, other=0).to(tl.int64)
    b_row = tl.load(right_row + i, mask=here, other=0).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for at in range(0, width, COLUMNS):
        n = at + tl.arange(0, COLUMNS)
        mask = here[:, None] & (n < width)[None, :]
        a = tl.load(left + a_row[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(right + b_row[:, None] * width + n[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    if ADD:
        total += tl.load(before + i, mask=here, other=0.0)
    tl.store(out + i, total, mask=here)


def row_dots(
    left: Tensor, right: Tensor, left_row: Tensor, right_row: Tensor, before: Tensor | None = None
) -> Tensor:
    """Dot products of listed rows, float32, added to `before` if given: the gradient of gates."""
    n_rows, width = left_row.shape[0], left.shape[1]
    out = torch.empty(n_rows, dtype=torch.float32, device=left.device)
    if n_rows:
        _row_dots[(triton.cdiv(n_rows, 16),)](
            left,
            right,
            left_row,
            right_row,
            before,
            out,
            n_rows,
            width,
            before is not None,
            16,
            block(width, 128),
        )
    return out
