"""Kernels for a few tokens: the expert feedforward.

Up to eight tokens every (token, choice) reads its expert on its own, by programs that find the choice themselves.
Above, an expert that several tokens chose is read once: a program multiplies all tokens by one expert, whose gates are
zero for those that did not choose it, and experts that nobody chose are not read. The arithmetic that this wastes is
hidden behind the weights. Legend as in `decode.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.activation import is_gated
from moeut_kernels.triton_decode import after_previous, launch, start, tiles, token_tile


@triton.jit
def _keys(logits, n_experts, EXPERTS: tl.constexpr):
    """Sortable keys `[1, EXPERTS]` of one row: the ordered bits of a logit above its reversed column."""
    e = tl.arange(0, EXPERTS)
    value = tl.load(logits + e, mask=e < n_experts, other=-float("inf"))
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered * EXPERTS + (EXPERTS - 1 - e))[None, :]


@triton.jit
def _active(z, value, ACTIVATION: tl.constexpr):
    """The activation of float32 `z`; gated ones multiply by `value`."""
    if ACTIVATION == "relu":
        hidden = tl.maximum(z, 0.0)
    elif ACTIVATION == "gelu":
        hidden = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        hidden = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "swiglu":
        hidden = z / (1.0 + tl.exp(-z)) * value
    else:
        hidden = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476)) * value
    return hidden


@triton.jit
def _up_few(
    x, logits, up, index, gates, parts, logits_stride, d_model, width, n_experts, top_k,
    EXPERTS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One choice of one token times a slice of its expert's rows. The choice: the largest key below the last one."""
    row, slot, split = tl.program_id(0) // top_k, tl.program_id(0) % top_k, tl.program_id(1)
    d = split * DEPTH + tl.arange(0, DEPTH)
    f = tl.arange(0, WIDTH)
    after_previous(EARLY)
    rows = tl.load(x + row * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    keys = tl.reshape(_keys(logits + row * logits_stride, n_experts, EXPERTS), (EXPERTS,))
    lowest = tl.full((EXPERTS,), -(2**62), tl.int64)
    mine = tl.max(keys, 0)
    for _ in range(slot):
        mine = tl.max(tl.where(keys < mine, keys, lowest), 0)
    expert = EXPERTS - 1 - (mine & (EXPERTS - 1))
    w = tl.load(
        up + (expert * d_model + d)[:, None] * width + f[None, :],
        mask=(d < d_model)[:, None] & (f < width)[None, :], other=0.0,
    )  # fmt: skip
    part = tl.sum(w.to(tl.float32) * rows[:, None], 0)
    place = tl.program_id(0)
    tl.store(parts + (place * tl.num_programs(1) + split) * width + f, part, mask=f < width)
    if split == 0:
        high = ((mine - (mine & (EXPERTS - 1))) // EXPERTS).to(tl.int32)
        score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
        tl.store(index + place, expert.to(tl.int32))
        tl.store(gates + place, 1.0 / (1.0 + tl.exp(-score)))


@triton.jit
def _down_few(
    parts, index, gates, down, out, d_model, d_expert, top_k, n_splits, n_tokens,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of the output, summed over some choices of one token, whose rows are taken as one matrix."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group, row = tl.program_id(1), tl.program_id(2)
    r, s = tl.arange(0, SLOTS * WIDTH), tl.arange(0, SPLITS)
    slot, f = group * SLOTS + r // WIDTH, r % WIDTH
    here = (slot < top_k) & (f < d_expert)
    place = row * top_k + slot
    width = d_expert * 2 if GATED else d_expert
    after_previous(EARLY)
    expert = tl.load(index + place, mask=here, other=0).to(tl.int64)
    gate = tl.load(gates + place, mask=here, other=0.0)
    at = parts + (place * n_splits)[None, :] * width + s[:, None] * width + f[None, :]
    mask = (s < n_splits)[:, None] & here[None, :]
    pre = tl.load(at, mask=mask, other=0.0)
    w = tl.load(
        down + (expert * d_expert + f)[:, None] * d_model + column[None, :],
        mask=here[:, None] & (column < d_model)[None, :], other=0.0,
    )  # fmt: skip
    z = tl.sum(pre, 0)
    if GATED:
        value = tl.sum(tl.load(at + d_expert, mask=mask, other=0.0), 0)
    else:
        value = z
    hidden = _active(z, value, ACTIVATION) * gate
    acc = tl.sum(w.to(tl.float32) * hidden[:, None], 0)
    tl.store(out + (group * n_tokens + row) * d_model + column, acc, mask=column < d_model)


@triton.jit
def _gates(
    logits,
    gates,
    logits_stride,
    n_experts,
    top_k,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row of the matrix of gates: sigmoids of the chosen experts, zero elsewhere."""
    row = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    after_previous(EARLY)
    keys = _keys(logits + row * logits_stride, n_experts, EXPERTS)
    top = tl.topk(keys, CHOSEN)
    last = tl.sum(tl.sum(tl.where((tl.arange(0, CHOSEN) == top_k - 1)[None, :], top, 0), 1), 0)
    chosen = tl.reshape(keys, (EXPERTS,)) >= last
    score = tl.load(logits + row * logits_stride + e, mask=e < n_experts, other=0.0)
    gate = tl.where(chosen, 1.0 / (1.0 + tl.exp(-score)), 0.0)
    tl.store(gates + row * n_experts + e, gate, mask=e < n_experts)


@triton.jit
def _up(
    x, gates, up, hidden, used, n_tokens, d_model, d_expert, n_experts,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """All tokens times one expert, gated; nothing but a mark for an expert that nobody chose."""
    expert = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    after_previous(EARLY)
    gate = tl.load(gates + n * n_experts + expert, mask=n < n_tokens, other=0.0)
    wanted = tl.max(gate, 0) > 0
    tl.store(used + tl.program_id(1) * n_experts + expert, wanted.to(tl.int32))
    if wanted:
        f = tl.arange(0, WIDTH)
        width = d_expert * 2 if GATED else d_expert
        acc = tl.zeros((TOKENS, WIDTH), tl.float32)
        acc_value = tl.zeros((TOKENS, WIDTH), tl.float32)
        for at in range(0, d_model, DEPTH):
            d = at + tl.arange(0, DEPTH)
            mask = (n < n_tokens)[:, None] & (d < d_model)[None, :]
            rows = tl.load(x + n[:, None] * d_model + d[None, :], mask=mask, other=0.0)
            place = up + (expert * d_model + d)[:, None] * width + f[None, :]
            here = (d < d_model)[:, None] & (f < d_expert)[None, :]
            acc = tl.dot(rows, tl.load(place, mask=here, other=0.0), acc, input_precision="ieee")
            if GATED:
                w = tl.load(place + d_expert, mask=here, other=0.0)
                acc_value = tl.dot(rows, w, acc_value, input_precision="ieee")
        result = _active(acc, acc_value, ACTIVATION) * gate[:, None]
        tl.store(
            hidden + (n[:, None] * n_experts + expert) * d_expert + f[None, :],
            result.to(hidden.dtype.element_ty),
            mask=(n < n_tokens)[:, None] & (f < d_expert)[None, :],
        )


@triton.jit
def _down(
    hidden, used, down, out, n_tokens, d_model, d_expert, n_experts,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some columns of the output of all tokens, summed over every GROUPS-th expert."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    f = tl.arange(0, WIDTH)
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    after_previous(EARLY)
    for e in range(group, n_experts, GROUPS):
        limit = tl.where(tl.load(used + tl.program_id(2) * n_experts + e) != 0, d_expert, 0)
        h = tl.load(
            hidden + (n.to(tl.int64)[:, None] * n_experts + e) * d_expert + f[None, :],
            mask=(n < n_tokens)[:, None] & (f < limit)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            down + (tl.cast(e, tl.int64) * d_expert + f)[:, None] * d_model + column[None, :],
            mask=(f < limit)[:, None] & (column < d_model)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(h, w, acc, input_precision="ieee")
    tl.store(
        out + (group * n_tokens + n)[:, None] * d_model + column[None, :],
        acc,
        mask=(n < n_tokens)[:, None] & (column < d_model)[None, :],
    )


def expert_feedforward(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str
) -> Tensor:
    """Body of `decode.expert_feedforward`."""
    few = x.shape[0] <= tiles(up).few
    return (_few if few else _many)(x, logits, up, down, top_k, activation)


def _few(x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str) -> Tensor:
    (n_tokens, d_model), (n_experts, d_expert, _), width = x.shape, down.shape, up.shape[2]
    sizes, early = tiles(up), start(up)
    n_splits, n_groups = triton.cdiv(d_model, sizes.up_depth), triton.cdiv(top_k, sizes.down_slots)
    index = torch.empty(n_tokens * top_k, dtype=torch.int32, device=x.device)
    gates = torch.empty(n_tokens * top_k, dtype=torch.float32, device=x.device)
    parts = torch.empty(n_tokens * top_k, n_splits, width, dtype=torch.float32, device=x.device)
    out = torch.empty(n_groups, n_tokens, d_model, dtype=torch.float32, device=x.device)
    _up_few[(n_tokens * top_k, n_splits)](
        x, logits, up, index, gates, parts, logits.stride(0), d_model, width, n_experts, top_k,
        triton.next_power_of_2(n_experts), sizes.up_depth, triton.next_power_of_2(width), early, **launch(up, 4),
    )  # fmt: skip
    _down_few[(triton.cdiv(d_model, sizes.down_columns), n_groups, n_tokens)](
        parts, index, gates, down, out, d_model, d_expert, top_k, n_splits, n_tokens,
        activation, is_gated(activation), sizes.down_slots, triton.next_power_of_2(n_splits),
        triton.next_power_of_2(d_expert), sizes.down_columns, early, **launch(up, 4),
    )  # fmt: skip
    return out


def _many(x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str) -> Tensor:
    (n_tokens, d_model), (n_experts, d_expert, _) = x.shape, down.shape
    experts, chosen = triton.next_power_of_2(n_experts), triton.next_power_of_2(top_k)
    tokens, width = token_tile(n_tokens), max(16, triton.next_power_of_2(d_expert))
    n_tiles, sizes, early = triton.cdiv(n_tokens, tokens), tiles(up), start(up)
    gates = torch.empty(n_tokens, n_experts, dtype=torch.float32, device=x.device)
    used = torch.empty(n_tiles, n_experts, dtype=torch.int32, device=x.device)
    hidden = torch.empty(n_tokens, n_experts, d_expert, dtype=up.dtype, device=x.device)
    groups, columns = min(sizes.groups, n_experts), sizes.many_columns
    out = torch.empty(groups, n_tokens, d_model, dtype=torch.float32, device=x.device)
    _gates[(n_tokens,)](
        logits, gates, logits.stride(0), n_experts, top_k, experts, chosen, early, **launch(up, 4)
    )
    _up[(n_experts, n_tiles)](
        x if x.dtype == up.dtype else x.to(up.dtype), gates, up, hidden, used, n_tokens, d_model, d_expert, n_experts,
        activation, is_gated(activation), tokens, width, sizes.many_depth, early,
        **launch(up, sizes.many_warps, sizes.many_stages),
    )  # fmt: skip
    _down[(triton.cdiv(d_model, columns), groups, n_tiles)](
        hidden, used, down, out, n_tokens, d_model, d_expert, n_experts,
        tokens, width, columns, groups, early, **launch(up, sizes.many_warps, sizes.many_stages),
    )  # fmt: skip
    return out
