"""Kernel for a few tokens: attention of one new token over a memory with room, in slices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.decode import Attended
from moeut_kernels.triton_decode import after_previous, launch, start, tiles

PROGRAMS = 1056
"""Enough to fill a large GPU where the memory is long."""

SHORTEST = 64
"""Positions of the shortest slice."""


@triton.jit
def _seen(q, k, v, j, end, top, mass, acc):
    """Softmax over a block of keys `[J, F]` on top of what was seen before."""
    score = tl.where(j < end, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
    higher = tl.maximum(top, tl.max(score, 0))
    base = tl.where(higher > -float("inf"), higher, 0.0)  # a block without anything to see weighs nothing
    weight = tl.exp(score - base)
    fade = tl.exp(top - base)
    acc = acc * fade + tl.sum(weight[:, None] * v.to(tl.float32), 0)
    return higher, mass * fade + tl.sum(weight, 0), acc


@triton.jit
def _attend(
    query, key, value, keys, values, position, cosines, sines, sums, tops, masses,
    n_tokens, n_heads, d_head, room, chunk, query_stride, key_stride, value_part, value_stride, scale,
    HALF: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one token over a slice of the memory; the first slice also holds the token itself.

    All loads that do not wait for each other come first. With ONE a slice is a single block.
    """
    row, head, split = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads, tl.program_id(1)
    d = tl.arange(0, WIDTH)
    here = d < d_head
    own = d < tl.where(split == 0, d_head, 0)
    first = (tl.cast(row, tl.int64) * n_heads + head) * room
    query += row * query_stride + head * d_head
    key += row * key_stride + head * d_head
    value += row * value_stride + head * d_head
    after_previous(EARLY)
    place = tl.load(position + row).to(tl.int32)
    q = tl.load(query + d, mask=here, other=0.0).to(tl.float32)
    new = tl.load(key + d, mask=own, other=0.0).to(tl.float32)
    add = tl.zeros((WIDTH,), tl.float32)
    if HALF > 0:
        turns = d < 2 * HALF
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        q_other = tl.load(query + partner, mask=turns, other=0.0).to(tl.float32)
        new_other = tl.load(key + partner, mask=turns & own, other=0.0).to(tl.float32)
    for p in tl.static_range(PARTS):
        add += tl.load(value + p * value_part + d, mask=own, other=0.0).to(tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, place)
    if HALF > 0:
        angle = place * HALF + tl.where(d < HALF, d, d - HALF)
        cos = tl.load(cosines + angle, mask=turns, other=1.0)
        sin = tl.load(sines + angle, mask=turns, other=0.0)
    if ONE:
        j = begin + tl.arange(0, BLOCK)
        cell = (first + j)[:, None] * d_head + d[None, :]
        mask = (j < end)[:, None] & here[None, :]
        k = tl.load(keys + cell, mask=mask, other=0.0)
        v = tl.load(values + cell, mask=mask, other=0.0)
    if HALF > 0:
        sign = tl.where(d < HALF, -1.0, 1.0)
        q = q * cos + sign * q_other * sin
        new = new * cos + sign * new_other * sin
    q *= scale
    top = tl.full((), -float("inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    if ONE:
        top, mass, acc = _seen(q, k, v, j, end, top, mass, acc)
    else:
        for at in range(begin, end, BLOCK):
            j = at + tl.arange(0, BLOCK)
            cell = (first + j)[:, None] * d_head + d[None, :]
            mask = (j < end)[:, None] & here[None, :]
            k = tl.load(keys + cell, mask=mask, other=0.0)
            v = tl.load(values + cell, mask=mask, other=0.0)
            top, mass, acc = _seen(q, k, v, j, end, top, mass, acc)
    if split == 0:
        new_key = new.to(keys.dtype.element_ty)
        new_value = add.to(values.dtype.element_ty)
        last = (first + place) * d_head + d
        tl.store(keys + last, new_key, mask=here)
        tl.store(values + last, new_value, mask=here)
        score = tl.sum(new_key.to(tl.float32) * q, 0)
        higher = tl.maximum(top, score)
        weight = tl.exp(score - higher)
        fade = tl.exp(top - higher)
        acc = acc * fade + weight * new_value.to(tl.float32)
        mass = mass * fade + weight
        top = higher
    at = (split * n_tokens + row) * n_heads + head
    tl.store(sums + at * d_head + d, acc, mask=here)
    tl.store(tops + at, top)
    tl.store(masses + at, mass)


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
    slices = max(1, min(triton.cdiv(PROGRAMS, n_tokens * n_heads), room // SHORTEST, 16))
    block = tiles(keys).attend_block
    chunk = triton.cdiv(triton.cdiv(room, slices), block) * block
    if chunk <= SHORTEST and n_tokens * n_heads * slices <= PROGRAMS // 4:
        block = chunk = triton.next_power_of_2(chunk)
    sums = torch.empty(slices, n_tokens, n_heads, d_head, dtype=torch.float32, device=keys.device)
    tops, masses = (torch.empty(slices, n_tokens, n_heads, device=keys.device) for _ in range(2))
    cosines, sines = (position, position) if rope is None else rope
    _attend[(n_tokens * n_heads, slices)](
        query, key, value, keys, values, position, cosines, sines, sums, tops, masses,
        n_tokens, n_heads, d_head, room, chunk, query.stride(0), key.stride(0), value.stride(0), value.stride(1),
        d_head**-0.5, 0 if rope is None else cosines.shape[1], value.shape[0],
        max(16, triton.next_power_of_2(d_head)), block, block == chunk, start(keys), **launch(keys, 4),
    )  # fmt: skip
    return Attended(sums, tops, masses)
