"""A norm of the residual stream in Triton, with all that lies around it: one pass forward, one pass backward.

Forward: add what the last block gave, normalise, copy in the dtype of products. Backward: the gradient that passes by,
the unsummed rows of what experts return, and the gradient of the norm, added up before anything is written.
Legend: N rows of the stream, D columns, R rows to be added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.triton_tiles import interpreted

RESIDENT = {
    128: (1, 6, 80),
    256: (2, 6, 80),
    1024: (4, 6, 80),
    2048: (4, 4, 128),
    4096: (8, 2, 128),
    8192: (16, 1, 128),
}
"""By columns up to: warps of a program of the backward, how many are started on a multiprocessor, and registers of a
thread that let as many stay there.

A program takes rows in turn and keeps the sums for weight and bias: one that has to wait for its place makes a tail."""


@triton.jit
def _fan(
    residual, addend, weight, bias, total, normed, low, means, scales, n_rows, eps,
    width: tl.constexpr, TERMS: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr, LOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """total = residual + sum over TERMS of addend; normed = (total - mean) · scale · weight + bias; low: a copy."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, COLUMNS)
    wide = n < width
    at = row * width + n
    x = tl.load(residual + at, mask=wide, other=0.0).to(tl.float32)
    for j in tl.static_range(TERMS):
        x += tl.load(addend + (row * TERMS + j) * width + n, mask=wide, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width if CENTER else 0.0
    away = tl.where(wide, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(away * away, 0) / width + eps)
    y = away * scale * tl.load(weight + n, mask=wide, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + n, mask=wide, other=0.0).to(tl.float32)
    if TERMS:
        tl.store(total + at, x.to(total.dtype.element_ty), mask=wide)
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=wide)
    if LOW:
        tl.store(low + at, x.to(low.dtype.element_ty), mask=wide)
    if CENTER:
        tl.store(means + row, mean)
    tl.store(scales + row, scale)


def fan(
    residual: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a stream [N, D] and addend [N, H, D]: total, normed, copy in `dtype`, means, inverse deviations.

    total is empty without an addend, the copy where the stream has `dtype`, means unless `center`.
    """
    residual, weight = residual.contiguous(), weight.contiguous()
    addend = None if addend is None else addend.contiguous()
    bias = None if bias is None else bias.contiguous()
    n_rows, width = residual.shape
    terms = 0 if addend is None else addend.shape[1]
    new = residual.new_empty
    total = new(residual.shape if terms else 0)
    normed, low = (
        new(residual.shape, dtype=dtype),
        new(residual.shape if dtype != residual.dtype else 0, dtype=dtype),
    )
    means, scales = new(n_rows if center else 0, dtype=torch.float32), new(n_rows, dtype=torch.float32)
    columns = triton.next_power_of_2(width)
    if n_rows:
        _fan[(n_rows,)](
            residual, addend, weight, bias, total, normed, low, means, scales, n_rows, eps,
            width, terms, center, bias is not None, low.numel() > 0, columns, num_warps=min(16, max(1, columns // 256)),
        )  # fmt: skip
    return total, normed, low, means, scales


@triton.jit
def _fan_backward(
    passing, d_normed, rows, position, source, weight, means, scales, out, low, d_affine, n_rows,
    width: tl.constexpr, stride_rows: tl.constexpr,
    PASSING: tl.constexpr, NORMED: tl.constexpr, TERMS: tl.constexpr, LISTED: tl.constexpr, CENTER: tl.constexpr,
    LOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = passing + sum over TERMS of rows + gradient of the norm; low: a copy; d_affine: of weight and bias."""
    n = tl.arange(0, COLUMNS)
    wide = n < width
    w = tl.load(weight + n, mask=wide, other=0.0).to(tl.float32)
    d_weight = tl.zeros((COLUMNS,), tl.float32)
    d_bias = tl.zeros((COLUMNS,), tl.float32)
    for here in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(here, tl.int64)
        at = row * width + n
        if PASSING:
            total = tl.load(passing + at, mask=wide, other=0.0).to(tl.float32)
        else:
            total = tl.zeros((COLUMNS,), tl.float32)
        if NORMED:
            dy = tl.load(d_normed + at, mask=wide, other=0.0).to(tl.float32)
            mean = tl.load(means + row) if CENTER else 0.0
            scale = tl.load(scales + row)
            unit = (tl.load(source + at, mask=wide, other=0.0).to(tl.float32) - mean) * scale
            d_weight += dy * unit
            d_bias += dy
            g = dy * w
            total += scale * (g - unit * (tl.sum(g * unit, 0) / width))
            if CENTER:
                total -= scale * (tl.sum(g, 0) / width)
        for j in tl.static_range(TERMS):
            r = row * TERMS + j
            r = tl.load(position + r).to(tl.int64) if LISTED else r
            total += tl.load(rows + r * stride_rows + n, mask=wide, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=wide)
        if LOW:
            tl.store(low + at, total.to(low.dtype.element_ty), mask=wide)
    if NORMED:
        sums = d_affine + tl.program_id(0) * 2 * width + n
        tl.store(sums, d_weight, mask=wide)
        tl.store(sums + width, d_bias, mask=wide)


def fan_backward(
    passing: Tensor | None, d_normed: Tensor | None, rows: Tensor | None, position: Tensor | None, terms: int,
    source: Tensor, weight: Tensor, means: Tensor, scales: Tensor, center: bool, dtype: torch.dtype,
    low_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of the stream in `dtype`, its copy in `low_dtype`, and those of weight and bias, float32 [2, D].

    passing: gradient of the total [N, D]. rows [N · terms, D' >= D], in the order of the stream or where `position`
    says. source: the stream, or a copy of it. Empty: the copy without `low_dtype`, the last without d_normed.
    """
    source, weight = source.contiguous(), weight.contiguous()
    passing = None if passing is None else passing.contiguous()
    d_normed = None if d_normed is None else d_normed.contiguous()
    rows = None if rows is None else rows.contiguous()
    n_rows, width = source.shape
    new = source.new_empty
    out = new(source.shape, dtype=dtype)
    low = new(0) if low_dtype is None else new(source.shape, dtype=low_dtype)
    columns = triton.next_power_of_2(width)
    warps, resident, registers = next(fit for most, fit in RESIDENT.items() if columns <= most)
    n_programs = min(n_rows, _processors(source.device) * resident)
    sums = new((n_programs, 2, width) if d_normed is not None else (0, 2, 0), dtype=torch.float32)
    if n_rows:
        _fan_backward[(n_programs,)](
            passing, d_normed, rows, position, source, weight, means, scales, out, low, sums, n_rows,
            width, 0 if rows is None else rows.shape[1],
            passing is not None, d_normed is not None, 0 if rows is None else terms, position is not None, center,
            low_dtype is not None, columns, num_warps=warps,
            maxnreg=None if interpreted() else registers,
        )  # fmt: skip
    return out, low, sums.sum(0)


def _processors(device: torch.device) -> int:
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
