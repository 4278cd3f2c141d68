"""Kernels for a few tokens: value and output experts of SwitchHead, and attention over a memory with room.

For few tokens a program finds the experts of one token and head by itself and reads a slice of each. For more it takes
all tokens by the experts of a head in turn: nearly every expert is somebody's choice. Legend as in `decode.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.decode import Attended
from moeut_kernels.triton_decode import after_previous, launch, start, tiles, token_tile


@triton.jit
def _mixed_experts(
    left, weight, k, column, n_experts, d_in, d_out,
    GATED: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """A slice of the gated sum of the matrices of one head's chosen experts, of which `left` are the logits."""
    e = tl.arange(0, EXPERTS)
    mask = (k < d_in)[:, None] & (column < d_out)[None, :]
    at = weight + k[:, None] * d_out + column[None, :]
    if GATED:
        mixed = tl.zeros((k.shape[0], column.shape[0]), tl.float32)
        for _ in tl.static_range(TOP_K):
            best = tl.max(left, 0)
            expert = tl.min(tl.where(left == best, e, EXPERTS), 0)
            w = tl.load(at + expert.to(tl.int64) * d_in * d_out, mask=mask, other=0.0)
            mixed += w.to(tl.float32) / (1.0 + tl.exp(-best))
            left = tl.where(e == expert, -float("inf"), left)
    else:
        mixed = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return mixed


@triton.jit
def _last_choice(logits, n, n_tokens, n_experts, logits_stride, TOP_K: tl.constexpr, EXPERTS: tl.constexpr):
    """Logit and number `[TOKENS]` of the last of each token's chosen experts of one head."""
    e = tl.arange(0, EXPERTS)[None, :]
    here = (n < n_tokens)[:, None] & (e < n_experts)
    left = tl.load(logits + n[:, None] * logits_stride + e, mask=here, other=-float("inf"))
    for _ in tl.static_range(TOP_K):
        best = tl.max(left, 1)
        expert = tl.min(tl.where(left == best[:, None], e, EXPERTS), 1)
        left = tl.where(e == expert[:, None], -float("inf"), left)
    return best, expert


@triton.jit
def _gated_product(
    rows, logits, weight, n, k, column, n_tokens, n_experts, d_in, d_out, logits_stride,
    GATED: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the experts of one head of gate x (rows @ a slice of the expert)."""
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if GATED:
        last, last_expert = _last_choice(logits, n, n_tokens, n_experts, logits_stride, TOP_K, EXPERTS)
    for expert in range(n_experts):
        w = tl.load(
            weight + (tl.cast(expert, tl.int64) * d_in + k)[:, None] * d_out + column[None, :],
            mask=(k < d_in)[:, None] & (column < d_out)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(rows, w, input_precision="ieee")
        if GATED:
            score = tl.load(logits + n * logits_stride + expert, mask=n < n_tokens, other=-float("inf"))
            chosen = (score > last) | ((score == last) & (expert <= last_expert))
            product = tl.where(chosen, 1.0 / (1.0 + tl.exp(-score)), 0.0)[:, None] * product
        acc += product
    return acc


@triton.jit
def _values_few(
    x, logits, weight, out, n_tokens, n_heads, n_experts, d_model, d_head, logits_stride,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's value of one token, from a slice of the inputs."""
    n_columns = tl.cdiv(d_head, COLUMNS)
    head, split, row = tl.program_id(0) // n_columns, tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS)
    d = split * DEPTH + tl.arange(0, DEPTH)
    e = tl.arange(0, EXPERTS)
    after_previous(EARLY)
    left = tl.load(
        logits + row * logits_stride + head * n_experts + e, mask=e < n_experts, other=-float("inf")
    )
    rows = tl.load(x + row * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    first = weight + tl.cast(head * n_experts, tl.int64) * d_model * d_head
    mixed = _mixed_experts(left, first, d, column, n_experts, d_model, d_head, True, TOP_K, EXPERTS)
    acc = tl.sum(mixed * rows[:, None], 0)
    tl.store(out + ((split * n_tokens + row) * n_heads + head) * d_head + column, acc, mask=column < d_head)


@triton.jit
def _values(
    x, logits, weight, out, n_tokens, n_heads, n_experts, d_model, d_head, logits_stride,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The same for a tile of tokens."""
    n_columns = tl.cdiv(d_head, COLUMNS)
    head, split = tl.program_id(0) // n_columns, tl.program_id(1)
    column = tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    d = split * DEPTH + tl.arange(0, DEPTH)
    after_previous(EARLY)
    rows = tl.load(
        x + n[:, None] * d_model + d[None, :],
        mask=(n < n_tokens)[:, None] & (d < d_model)[None, :],
        other=0.0,
    ).to(weight.dtype.element_ty)
    first = weight + tl.cast(head * n_experts, tl.int64) * d_model * d_head
    acc = _gated_product(
        rows, logits + head * n_experts, first, n, d, column, n_tokens, n_experts, d_model, d_head, logits_stride,
        True, TOP_K, TOKENS, EXPERTS, COLUMNS,
    )  # fmt: skip
    tl.store(
        out + ((split * n_tokens + n) * n_heads + head)[:, None] * d_head + column[None, :],
        acc,
        mask=(n < n_tokens)[:, None] & (column < d_head)[None, :],
    )


def expert_values(x: Tensor, logits: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """Body of `decode.expert_values`: one addend for each slice of the inputs."""
    (n_tokens, d_model), (_, n_heads, n_experts), d_head = x.shape, logits.shape, weight.shape[2]
    sizes, early, experts = tiles(weight), start(weight), max(2, triton.next_power_of_2(n_experts))
    columns, depth = sizes.value_columns, sizes.value_depth
    n_splits, n_columns = triton.cdiv(d_model, depth), n_heads * triton.cdiv(d_head, columns)
    out = torch.empty(n_splits, n_tokens, n_heads, d_head, dtype=torch.float32, device=x.device)
    shape = (x, logits, weight, out, n_tokens, n_heads, n_experts, d_model, d_head, logits.stride(0), top_k)
    if n_tokens <= sizes.few:
        grid = (n_columns, n_splits, n_tokens)
        _values_few[grid](*shape, experts, columns, depth, early, **launch(weight, 4))
        return out
    tokens = token_tile(n_tokens)
    grid = (n_columns, n_splits, triton.cdiv(n_tokens, tokens))
    _values[grid](*shape, tokens, experts, columns, depth, early, **launch(weight, 4))
    return out


@triton.jit
def _outputs_few(
    sums, tops, masses, logits, weight, out, n_tokens, n_heads, n_experts, d_head, d_model, n_slices, logits_stride,
    GATED: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SLICES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of what one head adds to one token: its experts, times the slices of attention put together."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head, row = tl.program_id(1), tl.program_id(2)
    f, z, e = tl.arange(0, DEPTH), tl.arange(0, SLICES), tl.arange(0, EXPERTS)
    after_previous(EARLY)
    left = tl.load(
        logits + row * logits_stride + head * n_experts + e, mask=e < n_experts, other=-float("inf")
    )
    at = (z * n_tokens + row) * n_heads + head
    top = tl.load(tops + at, mask=z < n_slices, other=-float("inf"))
    mass = tl.load(masses + at, mask=z < n_slices, other=0.0)
    part = tl.load(
        sums + at[:, None] * d_head + f[None, :],
        mask=(z < n_slices)[:, None] & (f < d_head)[None, :],
        other=0.0,
    )
    first = weight + tl.cast(head * n_experts, tl.int64) * d_head * d_model
    mixed = _mixed_experts(left, first, f, column, n_experts, d_head, d_model, GATED, TOP_K, EXPERTS)
    scale = tl.exp(top - tl.max(top, 0))
    rows = tl.sum(part * scale[:, None], 0) / tl.sum(mass * scale, 0)
    acc = tl.sum(mixed * rows[:, None], 0)
    tl.store(out + (head * n_tokens + row) * d_model + column, acc, mask=column < d_model)


@triton.jit
def _outputs(
    sums, tops, masses, logits, weight, out, n_tokens, n_heads, n_experts, d_head, d_model, n_slices, logits_stride,
    GATED: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same for a tile of tokens."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    f = tl.arange(0, DEPTH)
    top = tl.full((TOKENS,), -float("inf"), tl.float32)
    mass = tl.zeros((TOKENS,), tl.float32)
    mixed = tl.zeros((TOKENS, DEPTH), tl.float32)
    after_previous(EARLY)
    for z in range(n_slices):
        top = tl.maximum(
            top, tl.load(tops + (z * n_tokens + n) * n_heads + head, mask=n < n_tokens, other=0.0)
        )
    for z in range(n_slices):
        at = (z * n_tokens + n) * n_heads + head
        scale = tl.exp(tl.load(tops + at, mask=n < n_tokens, other=0.0) - top)
        mass += scale * tl.load(masses + at, mask=n < n_tokens, other=1.0)
        part = tl.load(
            sums + at[:, None] * d_head + f[None, :],
            mask=(n < n_tokens)[:, None] & (f < d_head)[None, :],
            other=0.0,
        )
        mixed += scale[:, None] * part
    rows = (mixed / mass[:, None]).to(weight.dtype.element_ty)
    first = weight + tl.cast(head * n_experts, tl.int64) * d_head * d_model
    acc = _gated_product(
        rows, logits + head * n_experts, first, n, f, column, n_tokens, n_experts, d_head, d_model, logits_stride,
        GATED, TOP_K, TOKENS, EXPERTS, COLUMNS,
    )  # fmt: skip
    tl.store(
        out + (head * n_tokens + n)[:, None] * d_model + column[None, :],
        acc,
        mask=(n < n_tokens)[:, None] & (column < d_model)[None, :],
    )


def expert_outputs(attended: Attended, logits: Tensor | None, weight: Tensor, top_k: int) -> Tensor:
    """Body of `decode.expert_outputs`: one addend for each head."""
    slices, n_tokens, n_heads, d_head = attended.sums.shape
    n_experts, d_model = weight.shape[0] // n_heads, weight.shape[2]
    sizes, early, experts = tiles(weight), start(weight), max(2, triton.next_power_of_2(n_experts))
    columns, depth, gated = sizes.output_columns, max(16, triton.next_power_of_2(d_head)), logits is not None
    out = torch.empty(n_heads, n_tokens, d_model, dtype=torch.float32, device=weight.device)
    logits, stride = (attended.tops, 0) if logits is None else (logits, logits.stride(0))
    shape = (
        *attended, logits, weight, out, n_tokens, n_heads, n_experts, d_head, d_model, slices, stride, gated, top_k,
    )  # fmt: skip
    if n_tokens <= sizes.few:
        grid = (triton.cdiv(d_model, columns), n_heads, n_tokens)
        n_rows = triton.next_power_of_2(slices)
        _outputs_few[grid](*shape, experts, columns, depth, n_rows, early, **launch(weight, 4))
        return out
    tokens = token_tile(n_tokens)
    grid = (triton.cdiv(d_model, columns), n_heads, triton.cdiv(n_tokens, tokens))
    _outputs[grid](*shape, tokens, experts, columns, depth, early, **launch(weight, 4))
    return out
