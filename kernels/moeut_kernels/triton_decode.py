"""Kernels for a few tokens: residual sum and norm with the product that follows; sizes and launching of all of them.

A kernel may start while the one before it ends: it fetches weights first, then waits, then reads results. Legend as in
`decode.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.decode import Norm, Normed
from moeut_kernels.triton_tiles import interpreted


@dataclass(frozen=True)
class Tiles:
    """Sizes of programs; nothing is tuned while a model runs."""

    few: int = 8
    """Tokens that are treated one by one."""
    rows: int = 8
    """Rows of a program of the product with its norm."""
    up_depth: int = 128
    down_columns: int = 32
    down_slots: int = 2
    """Choices that one program of the down product adds up."""
    project_rows: int = 16
    many_depth: int = 64
    many_warps: int = 4
    many_stages: int = 3
    many_columns: int = 128
    groups: int = 32
    """Addends of the down product of many tokens: programs that share out the experts."""
    value_columns: int = 32
    value_depth: int = 128
    output_columns: int = 32
    attend_block: int = 32


_INTERPRETED = Tiles(
    up_depth=16, down_columns=16, many_depth=32, many_columns=32, value_columns=16, value_depth=32,
    output_columns=16, attend_block=16,
)  # fmt: skip
_FLOAT32 = Tiles(many_depth=32, many_columns=32, many_stages=2)
_HALF = Tiles()
_early = True


def tiles(weight: Tensor) -> Tiles:
    """Sizes for weights like this one."""
    if interpreted():
        return _INTERPRETED
    return _FLOAT32 if weight.dtype == torch.float32 else _HALF


@cache
def _can_start_early(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip or interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def start(weight: Tensor) -> bool:
    """Whether kernels on this weight start early."""
    return _early and _can_start_early(weight.device)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Let every kernel inside the block start only when the one before it has ended."""
    global _early
    before, _early = _early, False
    try:
        yield
    finally:
        _early = before


def launch(weight: Tensor, warps: int, stages: int = 3) -> dict[str, int | bool]:
    """How kernels are launched."""
    early = {"launch_pdl": True} if start(weight) else {}
    return {"num_warps": warps, "num_stages": stages, **early}


def token_tile(n_tokens: int) -> int:
    """Tokens of one program, where it takes many."""
    return min(64, max(16, triton.next_power_of_2(n_tokens)))


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """Wait for what the kernel before has written: nothing of it may be read, and nothing written, before this."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _norm_weights(weight, bias, d, d_model, BIASED: tl.constexpr):
    """Weight and bias of a norm."""
    scale = tl.load(weight + d, mask=d < d_model, other=0.0)
    if BIASED:
        shift = tl.load(bias + d, mask=d < d_model, other=0.0)
    else:
        shift = tl.zeros_like(scale)
    return scale, shift


@triton.jit
def _normalised(total, scale, shift, d, d_model, eps, LAYER: tl.constexpr):
    """Norm of one row, float32; zero behind its end."""
    if LAYER:
        centred = tl.where(d < d_model, total - tl.sum(total, 0) / d_model, 0.0)
    else:
        centred = total
    return centred / tl.sqrt(tl.sum(centred * centred, 0) / d_model + eps) * scale + shift


@triton.jit
def _summed(x, pending, row, n_tokens, d, d_model, ADDENDS: tl.constexpr):
    """One row of the residual stream with its addends, in their order."""
    here = d < d_model
    total = tl.load(x + row * d_model + d, mask=here, other=0.0).to(tl.float32)
    for p in tl.static_range(ADDENDS):
        total += tl.load(pending + (p * n_tokens + row) * d_model + d, mask=here, other=0.0)
    return total


@triton.jit
def _norm_project_few(
    x, pending, norm_weight, norm_bias, weight, bias, total_out, normed_out, out, n_tokens, d_model, n_rows, eps,
    ADDENDS: tl.constexpr, LAYER: tl.constexpr, NORM_BIASED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the product for all tokens. The weights are on their way before the norm is known."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (r < n_rows)[:, None] & (d < d_model)[None, :]
    w = tl.load(weight + r.to(tl.int64)[:, None] * d_model + d[None, :], mask=mask, other=0.0)
    scale, shift = _norm_weights(norm_weight, norm_bias, d, d_model, NORM_BIASED)
    after_previous(EARLY)
    for row in range(n_tokens):
        total = _summed(x, pending, row, n_tokens, d, d_model, ADDENDS)
        normed = _normalised(total, scale, shift, d, d_model, eps, LAYER)
        if tl.program_id(0) == 0:
            tl.store(total_out + row * d_model + d, total, mask=d < d_model)
            tl.store(normed_out + row * d_model + d, normed, mask=d < d_model)
        product = tl.sum(w.to(tl.float32) * normed[None, :], 1)
        if BIASED:
            product += tl.load(bias + r, mask=r < n_rows, other=0.0).to(tl.float32)
        tl.store(out + row * n_rows + r, product, mask=r < n_rows)


@triton.jit
def _sum_norm(
    x, pending, norm_weight, norm_bias, total_out, data_out, normed_out, n_tokens, d_model, eps,
    ADDENDS: tl.constexpr, LAYER: tl.constexpr, NORM_BIASED: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token: residual sum and norm, also in the dtype of the weights."""
    row = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    scale, shift = _norm_weights(norm_weight, norm_bias, d, d_model, NORM_BIASED)
    after_previous(EARLY)
    total = _summed(x, pending, row, n_tokens, d, d_model, ADDENDS)
    normed = _normalised(total, scale, shift, d, d_model, eps, LAYER)
    at, here = row * d_model + d, d < d_model
    tl.store(total_out + at, total, mask=here)
    tl.store(data_out + at, total.to(data_out.dtype.element_ty), mask=here)
    tl.store(normed_out + at, normed.to(normed_out.dtype.element_ty), mask=here)


@triton.jit
def _project(
    x, weight, bias, out, n_tokens, d_model, n_rows,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = x @ weight.T + bias for a tile of tokens and rows of the weight."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    after_previous(EARLY)
    for at in range(0, d_model, DEPTH):
        d = at + tl.arange(0, DEPTH)
        rows = tl.load(
            x + n[:, None] * d_model + d[None, :],
            mask=(n < n_tokens)[:, None] & (d < d_model)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + r.to(tl.int64)[:, None] * d_model + d[None, :],
            mask=(r < n_rows)[:, None] & (d < d_model)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(rows, tl.trans(w), acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(bias + r, mask=r < n_rows, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + n[:, None] * n_rows + r[None, :], acc, mask=(n < n_tokens)[:, None] & (r < n_rows)[None, :]
    )


def norm_project(
    x: Tensor, pending: Tensor | None, norm: Norm, weight: Tensor, bias: Tensor | None
) -> Normed:
    """Body of `decode.norm_project`: one kernel for few tokens, a norm and a product for more."""
    n_tokens, d_model = x.shape
    n_rows, width = weight.shape[0], triton.next_power_of_2(d_model)
    n_addends = 0 if pending is None else pending.shape[0]
    layer, norm_biased, biased = norm.kind == "layer", norm.bias is not None, bias is not None
    total = torch.empty(n_tokens, d_model, dtype=torch.float32, device=x.device)
    out = torch.empty(n_tokens, n_rows, dtype=torch.float32, device=x.device)
    sizes, warps = tiles(weight), 4 if width <= 1024 else 8
    if n_tokens <= sizes.few:
        normed = torch.empty_like(total)
        rows = sizes.rows // 2 if n_rows < 640 else sizes.rows
        _norm_project_few[(triton.cdiv(n_rows, rows),)](
            x, pending, norm.weight, norm.bias, weight, bias, total, normed, out, n_tokens, d_model, n_rows, norm.eps,
            n_addends, layer, norm_biased, biased, rows, width, start(weight), **launch(weight, warps),
        )  # fmt: skip
        return Normed(total, total, normed, out)
    data, normed = (torch.empty_like(total, dtype=weight.dtype) for _ in range(2))
    _sum_norm[(n_tokens,)](
        x, pending, norm.weight, norm.bias, total, data, normed, n_tokens, d_model, norm.eps,
        n_addends, layer, norm_biased, width, start(weight), **launch(weight, warps),
    )  # fmt: skip
    tokens, rows = token_tile(n_tokens), sizes.project_rows * (1 if n_rows < 2048 else 2)
    _project[(triton.cdiv(n_rows, rows), triton.cdiv(n_tokens, tokens))](
        normed, weight, bias, out, n_tokens, d_model, n_rows,
        biased, tokens, rows, sizes.many_depth, start(weight), **launch(weight, 4, 4),
    )  # fmt: skip
    return Normed(total, data, normed, out)
