"""Kernels for a few tokens: norm with product, and the expert feedforward.

Up to eight tokens every (token, choice) reads its expert on its own, by programs that find the choice themselves.
Above, an expert that several tokens chose is read once: a program multiplies all tokens by one expert, whose gates are
zero for those that did not choose it, and experts that nobody chose are not read. The arithmetic that this wastes is
hidden behind the weights. Legend as in `decode.py`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.activation import is_gated
from moeut_kernels.decode import Norm, Normed
from moeut_kernels.triton_tiles import interpreted


@dataclass(frozen=True)
class Tiles:
    """Sizes of programs; nothing is tuned while a model runs."""

    few: int = 8
    """Tokens that are treated one by one."""
    rows: int = 8
    """Rows of a program of the product with its norm."""
    up_depth: int = 64
    up_warps: int = 4
    down_columns: int = 64
    down_slots: int = 2
    """Choices that one program of the down product adds up."""
    down_warps: int = 4
    project_rows: int = 16
    many_depth: int = 64
    many_warps: int = 4
    many_stages: int = 3
    many_columns: int = 128
    groups: int = 16
    """Addends of the down product of many tokens: programs that share out the experts."""
    value_columns: int = 32
    value_depth: int = 128
    output_columns: int = 32
    attend_block: int = 64
    attend_warps: int = 4


_INTERPRETED = Tiles(
    up_depth=16, down_columns=16, many_depth=32, many_columns=32, value_columns=16, value_depth=32,
    output_columns=16, attend_block=16,
)  # fmt: skip
_FLOAT32 = Tiles(many_depth=32, many_columns=32, many_stages=2)
_HALF = Tiles()


def tiles(weight: Tensor) -> Tiles:
    """Sizes for weights like this one."""
    if interpreted():
        return _INTERPRETED
    return _FLOAT32 if weight.dtype == torch.float32 else _HALF


@triton.jit
def _normalised(total, weight, bias, d, d_model, eps, LAYER: tl.constexpr, BIASED: tl.constexpr):
    """Norm of one row, float32; zero behind its end."""
    here = d < d_model
    if LAYER:
        centred = tl.where(here, total - tl.sum(total, 0) / d_model, 0.0)
    else:
        centred = total
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / d_model + eps)
    normed = centred * scale * tl.load(weight + d, mask=here, other=0.0)
    if BIASED:
        normed += tl.load(bias + d, mask=here, other=0.0)
    return normed


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
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the product for all tokens. The weights are on their way before the norm is known."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (r < n_rows)[:, None] & (d < d_model)[None, :]
    w = tl.load(weight + r.to(tl.int64)[:, None] * d_model + d[None, :], mask=mask, other=0.0)
    for row in range(n_tokens):
        total = _summed(x, pending, row, n_tokens, d, d_model, ADDENDS)
        normed = _normalised(total, norm_weight, norm_bias, d, d_model, eps, LAYER, NORM_BIASED)
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
    ADDENDS: tl.constexpr, LAYER: tl.constexpr, NORM_BIASED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: residual sum and norm, also in the dtype of the weights."""
    row = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    total = _summed(x, pending, row, n_tokens, d, d_model, ADDENDS)
    normed = _normalised(total, norm_weight, norm_bias, d, d_model, eps, LAYER, NORM_BIASED)
    at, here = row * d_model + d, d < d_model
    tl.store(total_out + at, total, mask=here)
    tl.store(data_out + at, total.to(data_out.dtype.element_ty), mask=here)
    tl.store(normed_out + at, normed.to(normed_out.dtype.element_ty), mask=here)


@triton.jit
def _project(
    x, weight, bias, out, n_tokens, d_model, n_rows,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = x @ weight.T + bias for a tile of tokens and rows of the weight."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
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
            n_addends, layer, norm_biased, biased, rows, width, num_warps=warps,
        )  # fmt: skip
        return Normed(total, total, normed, out)
    data, normed = (torch.empty_like(total, dtype=weight.dtype) for _ in range(2))
    _sum_norm[(n_tokens,)](
        x, pending, norm.weight, norm.bias, total, data, normed, n_tokens, d_model, norm.eps,
        n_addends, layer, norm_biased, width, num_warps=warps,
    )  # fmt: skip
    tokens, rows = token_tile(n_tokens), sizes.project_rows * (1 if n_rows < 2048 else 2)
    _project[(triton.cdiv(n_rows, rows), triton.cdiv(n_tokens, tokens))](
        normed,
        weight,
        bias,
        out,
        n_tokens,
        d_model,
        n_rows,
        biased,
        tokens,
        rows,
        sizes.many_depth,
        num_warps=4,
        num_stages=4,
    )
    return Normed(total, data, normed, out)


def token_tile(n_tokens: int) -> int:
    """Tokens of one program."""
    return min(64, max(16, triton.next_power_of_2(n_tokens)))


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
    EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One choice of one token times a slice of its expert's rows."""
    row, slot, split = tl.program_id(0) // top_k, tl.program_id(0) % top_k, tl.program_id(1)
    top = tl.topk(_keys(logits + row * logits_stride, n_experts, EXPERTS), CHOSEN)
    mine = tl.sum(tl.sum(tl.where((tl.arange(0, CHOSEN) == slot)[None, :], top, 0), 1), 0)
    expert = EXPERTS - 1 - (mine & (EXPERTS - 1))
    d = split * DEPTH + tl.arange(0, DEPTH)
    f = tl.arange(0, WIDTH)
    rows = tl.load(x + row * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
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
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the output, summed over some choices of one token."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group, row = tl.program_id(1), tl.program_id(2)
    f, s = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    width = d_expert * 2 if GATED else d_expert
    acc = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.static_range(SLOTS):
        slot = group * SLOTS + i
        place = row * top_k + slot
        expert = tl.load(index + place, mask=slot < top_k, other=0).to(tl.int64)
        gate = tl.load(gates + place, mask=slot < top_k, other=0.0)
        limit = tl.where(slot < top_k, d_expert, 0)
        w = tl.load(
            down + (expert * d_expert + f)[:, None] * d_model + column[None, :],
            mask=(f < limit)[:, None] & (column < d_model)[None, :], other=0.0,
        )  # fmt: skip
        at = parts + (place * n_splits + s)[:, None] * width + f[None, :]
        here = (s < n_splits)[:, None] & (f < limit)[None, :]
        z = tl.sum(tl.load(at, mask=here, other=0.0), 0)
        if GATED:
            value = tl.sum(tl.load(at + d_expert, mask=here, other=0.0), 0)
        else:
            value = z
        hidden = _active(z, value, ACTIVATION) * gate
        acc += tl.sum(w.to(tl.float32) * hidden[:, None], 0)
    tl.store(out + (group * n_tokens + row) * d_model + column, acc, mask=column < d_model)


@triton.jit
def _gates(logits, gates, logits_stride, n_experts, top_k, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr):
    """A row of the matrix of gates: sigmoids of the chosen experts, zero elsewhere."""
    row = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
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
):  # fmt: skip
    """All tokens times one expert, gated; nothing but a mark for an expert that nobody chose."""
    expert = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
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
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some columns of the output of all tokens, summed over every GROUPS-th expert."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1)
    n = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    f = tl.arange(0, WIDTH)
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
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
    return (_feedforward_few if few else _feedforward_many)(x, logits, up, down, top_k, activation)


def _feedforward_few(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str
) -> Tensor:
    (n_tokens, d_model), (n_experts, d_expert, _), width = x.shape, down.shape, up.shape[2]
    experts, chosen = triton.next_power_of_2(n_experts), triton.next_power_of_2(top_k)
    sizes = tiles(up)
    depth, columns, n_slots = sizes.up_depth, sizes.down_columns, sizes.down_slots
    n_splits = triton.cdiv(d_model, depth)
    n_groups = triton.cdiv(top_k, n_slots)
    index = torch.empty(n_tokens * top_k, dtype=torch.int32, device=x.device)
    gates = torch.empty(n_tokens * top_k, dtype=torch.float32, device=x.device)
    parts = torch.empty(n_tokens * top_k, n_splits, width, dtype=torch.float32, device=x.device)
    out = torch.empty(n_groups, n_tokens, d_model, dtype=torch.float32, device=x.device)
    _up_few[(n_tokens * top_k, n_splits)](
        x, logits, up, index, gates, parts, logits.stride(0), d_model, width, n_experts, top_k,
        experts, chosen, depth, triton.next_power_of_2(width), num_warps=sizes.up_warps,
    )  # fmt: skip
    _down_few[(triton.cdiv(d_model, columns), n_groups, n_tokens)](
        parts, index, gates, down, out, d_model, d_expert, top_k, n_splits, n_tokens,
        activation, is_gated(activation), n_slots, triton.next_power_of_2(n_splits),
        triton.next_power_of_2(d_expert), columns, num_warps=sizes.down_warps,
    )  # fmt: skip
    return out


def _feedforward_many(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str
) -> Tensor:
    (n_tokens, d_model), (n_experts, d_expert, _) = x.shape, down.shape
    experts, chosen = triton.next_power_of_2(n_experts), triton.next_power_of_2(top_k)
    tokens, width = token_tile(n_tokens), max(16, triton.next_power_of_2(d_expert))
    n_tiles, sizes = triton.cdiv(n_tokens, tokens), tiles(up)
    gates = torch.empty(n_tokens, n_experts, dtype=torch.float32, device=x.device)
    used = torch.empty(n_tiles, n_experts, dtype=torch.int32, device=x.device)
    hidden = torch.empty(n_tokens, n_experts, d_expert, dtype=up.dtype, device=x.device)
    _gates[(n_tokens,)](logits, gates, logits.stride(0), n_experts, top_k, experts, chosen, num_warps=4)
    _up[(n_experts, n_tiles)](
        x.to(up.dtype), gates, up, hidden, used, n_tokens, d_model, d_expert, n_experts,
        activation, is_gated(activation), tokens, width, sizes.many_depth,
        num_warps=sizes.many_warps, num_stages=sizes.many_stages,
    )  # fmt: skip
    groups, columns = min(sizes.groups, n_experts), sizes.many_columns
    out = torch.empty(groups, n_tokens, d_model, dtype=torch.float32, device=x.device)
    _down[(triton.cdiv(d_model, columns), groups, n_tiles)](
        hidden, used, down, out, n_tokens, d_model, d_expert, n_experts,
        tokens, width, columns, groups, num_warps=sizes.many_warps, num_stages=sizes.many_stages,
    )  # fmt: skip
    return out
