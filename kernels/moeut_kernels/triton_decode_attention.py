"""Kernels for a few tokens: value and output experts of SwitchHead, and attention over a memory with room.

Value and output products take all tokens by one head's experts in turn and leave out experts that nobody chose; a slice
of the matrix per program keeps all multiprocessors reading. Legend as in `decode.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.decode import Attended
from moeut_kernels.triton_decode import tiles, token_tile


@triton.jit
def _head_gates(
    logits, n, n_tokens, n_experts, logits_stride,
    GATED: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """`[TOKENS, EXPERTS]` sigmoids of each token's chosen experts of one head, zero elsewhere; ones without GATED."""
    e = tl.arange(0, EXPERTS)[None, :]
    here = (n < n_tokens)[:, None] & (e < n_experts)
    if GATED:
        score = tl.load(logits + n[:, None] * logits_stride + e, mask=here, other=0.0)
        left = tl.where(e < n_experts, score, -float("inf"))
        gates = tl.zeros((TOKENS, EXPERTS), tl.float32)
        for _ in tl.static_range(TOP_K):
            best = tl.max(left, 1)[:, None]
            first = tl.min(tl.where(left == best, e, EXPERTS), 1)[:, None]
            gates = tl.where(e == first, 1.0 / (1.0 + tl.exp(-score)), gates)
            left = tl.where(e == first, -float("inf"), left)
        gates = tl.where(here, gates, 0.0)
    else:
        gates = tl.where(here, 1.0, 0.0)
    return gates


@triton.jit
def _gated_product(
    rows, gates, weight, k, column, n_experts, d_in, d_out,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over experts of gate x (rows @ a slice of the expert); experts without a gate are not read."""
    e = tl.arange(0, EXPERTS)
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for expert in range(n_experts):
        gate = tl.sum(tl.where((e == expert)[None, :], gates, 0.0), 1)
        limit = tl.where(tl.max(gate, 0) > 0, d_in, 0)
        w = tl.load(
            weight + (tl.cast(expert, tl.int64) * d_in + k)[:, None] * d_out + column[None, :],
            mask=(k < limit)[:, None] & (column < d_out)[None, :], other=0.0,
        )  # fmt: skip
        acc += gate[:, None] * tl.dot(rows, w, input_precision="ieee")
    return acc


@triton.jit
def _values(
    x, logits, weight, out, n_tokens, n_heads, n_experts, d_model, d_head, logits_stride,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some columns of one head's values, from a slice of the inputs."""
    n_columns = tl.cdiv(d_head, COLUMNS)
    head = tl.program_id(0) // n_columns
    column = tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    d = split * DEPTH + tl.arange(0, DEPTH)
    rows = tl.load(
        x + n[:, None] * d_model + d[None, :],
        mask=(n < n_tokens)[:, None] & (d < d_model)[None, :],
        other=0.0,
    ).to(weight.dtype.element_ty)
    gates = _head_gates(
        logits + head * n_experts, n, n_tokens, n_experts, logits_stride, True, TOP_K, TOKENS, EXPERTS
    )
    first = weight + tl.cast(head * n_experts, tl.int64) * d_model * d_head
    acc = _gated_product(rows, gates, first, d, column, n_experts, d_model, d_head, TOKENS, EXPERTS, COLUMNS)
    tl.store(
        out + ((split * n_tokens + n) * n_heads + head)[:, None] * d_head + column[None, :],
        acc,
        mask=(n < n_tokens)[:, None] & (column < d_head)[None, :],
    )


def expert_values(x: Tensor, logits: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """Body of `decode.expert_values`: one addend for each slice of the inputs."""
    (n_tokens, d_model), (_, n_heads, n_experts), d_head = x.shape, logits.shape, weight.shape[2]
    tokens, columns, depth = token_tile(n_tokens), tiles(weight).value_columns, tiles(weight).value_depth
    n_splits = triton.cdiv(d_model, depth)
    out = torch.empty(n_splits, n_tokens, n_heads, d_head, dtype=torch.float32, device=x.device)
    _values[(n_heads * triton.cdiv(d_head, columns), n_splits, triton.cdiv(n_tokens, tokens))](
        x, logits, weight, out, n_tokens, n_heads, n_experts, d_model, d_head, logits.stride(0),
        top_k, tokens, max(2, triton.next_power_of_2(n_experts)), columns, depth, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _outputs(
    sums, tops, masses, logits, weight, out, n_tokens, n_heads, n_experts, d_head, d_model, n_slices, logits_stride,
    GATED: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some columns of what one head adds: slices of attention put together, then the head's experts."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    f = tl.arange(0, DEPTH)
    top = tl.full((TOKENS,), -float("inf"), tl.float32)
    for z in range(n_slices):
        top = tl.maximum(
            top, tl.load(tops + (z * n_tokens + n) * n_heads + head, mask=n < n_tokens, other=0.0)
        )
    mass = tl.zeros((TOKENS,), tl.float32)
    mixed = tl.zeros((TOKENS, DEPTH), tl.float32)
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
    gates = _head_gates(
        logits + head * n_experts, n, n_tokens, n_experts, logits_stride, GATED, TOP_K, TOKENS, EXPERTS
    )
    first = weight + tl.cast(head * n_experts, tl.int64) * d_head * d_model
    acc = _gated_product(rows, gates, first, f, column, n_experts, d_head, d_model, TOKENS, EXPERTS, COLUMNS)
    tl.store(
        out + (head * n_tokens + n)[:, None] * d_model + column[None, :],
        acc,
        mask=(n < n_tokens)[:, None] & (column < d_model)[None, :],
    )


def expert_outputs(attended: Attended, logits: Tensor | None, weight: Tensor, top_k: int) -> Tensor:
    """Body of `decode.expert_outputs`: one addend for each head."""
    n_slices, n_tokens, n_heads, d_head = attended.sums.shape
    n_experts, d_model = weight.shape[0] // n_heads, weight.shape[2]
    tokens, columns = token_tile(n_tokens), tiles(weight).output_columns
    out = torch.empty(n_heads, n_tokens, d_model, dtype=torch.float32, device=weight.device)
    _outputs[(triton.cdiv(d_model, columns), n_heads, triton.cdiv(n_tokens, tokens))](
        *attended, attended.tops if logits is None else logits, weight, out,
        n_tokens, n_heads, n_experts, d_head, d_model, n_slices, 0 if logits is None else logits.stride(0),
        logits is not None, top_k, tokens, max(2, triton.next_power_of_2(n_experts)), columns,
        max(16, triton.next_power_of_2(d_head)), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _turned(x, d, d_head, cos, sin, HALF: tl.constexpr):
    """One head's query or key with its rotation, float32."""
    turned = tl.load(x + d, mask=d < d_head, other=0.0).to(tl.float32)
    if HALF > 0:
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        other = tl.load(x + partner, mask=d < 2 * HALF, other=0.0).to(tl.float32)
        turned = turned * cos + tl.where(d < HALF, -other, other) * sin
    return turned


@triton.jit
def _attend(
    query, key, value, keys, values, position, cosines, sines, sums, tops, masses,
    n_tokens, n_heads, d_head, room, chunk, query_stride, key_stride, value_part, value_stride, scale,
    HALF: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one token over a slice of the memory; the first slice also holds the token itself."""
    row, head, split = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads, tl.program_id(1)
    d = tl.arange(0, WIDTH)
    here = d < d_head
    place = tl.load(position + row).to(tl.int32)
    if HALF > 0:
        angle = place * HALF + tl.where(d < HALF, d, d - HALF)
        cos = tl.load(cosines + angle, mask=d < 2 * HALF, other=1.0)
        sin = tl.load(sines + angle, mask=d < 2 * HALF, other=0.0)
    else:
        cos = tl.full((WIDTH,), 1.0, tl.float32)
        sin = tl.zeros((WIDTH,), tl.float32)
    q = _turned(query + row * query_stride + head * d_head, d, d_head, cos, sin, HALF) * scale
    first = (tl.cast(row, tl.int64) * n_heads + head) * room
    top = tl.full((), -float("inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum(split * chunk + chunk, place)
    for at in range(split * chunk, end, BLOCK):
        j = at + tl.arange(0, BLOCK)
        cell = (first + j)[:, None] * d_head + d[None, :]
        mask = (j < end)[:, None] & here[None, :]
        k = tl.load(keys + cell, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + cell, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(j < end, tl.sum(k * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - higher)
        fade = tl.exp(top - higher)
        acc = acc * fade + tl.sum(weight[:, None] * v, 0)
        mass = mass * fade + tl.sum(weight, 0)
        top = higher
    if split == 0:
        new = _turned(key + row * key_stride + head * d_head, d, d_head, cos, sin, HALF)
        new = new.to(keys.dtype.element_ty)
        add = tl.zeros((WIDTH,), tl.float32)
        for p in tl.static_range(PARTS):
            add += tl.load(
                value + p * value_part + row * value_stride + head * d_head + d, mask=here, other=0.0
            )
        own = add.to(values.dtype.element_ty)
        cell = (first + place) * d_head + d
        tl.store(keys + cell, new, mask=here)
        tl.store(values + cell, own, mask=here)
        score = tl.sum(new.to(tl.float32) * q, 0)
        higher = tl.maximum(top, score)
        weight = tl.exp(score - higher)
        fade = tl.exp(top - higher)
        acc = acc * fade + weight * own.to(tl.float32)
        mass = mass * fade + weight
        top = higher
    at = (split * n_tokens + row) * n_heads + head
    tl.store(sums + at * d_head + d, acc, mask=here)
    tl.store(tops + at, top)
    tl.store(masses + at, mass)


def n_slices(n_tokens: int, n_heads: int, room: int) -> int:
    """Slices of the memory: enough programs for a large GPU, none of fewer than 64 positions."""
    return max(1, min(triton.cdiv(264, n_tokens * n_heads), room // 64, 16))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: tuple[Tensor, Tensor],
    position: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> Attended:
    """Body of `decode.attend`."""
    keys, values = memory
    n_tokens, n_heads, room, d_head = keys.shape
    slices, sizes = n_slices(n_tokens, n_heads, room), tiles(keys)
    block = sizes.attend_block
    chunk = triton.cdiv(triton.cdiv(room, slices), block) * block
    sums = torch.empty(slices, n_tokens, n_heads, d_head, dtype=torch.float32, device=keys.device)
    tops, masses = (torch.empty(slices, n_tokens, n_heads, device=keys.device) for _ in range(2))
    cosines, sines = (position, position) if rope is None else rope
    _attend[(n_tokens * n_heads, slices)](
        query, key, value, keys, values, position, cosines, sines, sums, tops, masses,
        n_tokens, n_heads, d_head, room, chunk, query.stride(0), key.stride(0), value.stride(0), value.stride(1),
        d_head**-0.5, 0 if rope is None else cosines.shape[1], value.shape[0],
        max(16, triton.next_power_of_2(d_head)), block, num_warps=sizes.attend_warps, num_stages=2,
    )  # fmt: skip
    return Attended(sums, tops, masses)
