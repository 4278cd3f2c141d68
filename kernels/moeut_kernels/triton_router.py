"""Choosing experts on the device: top-k with gates, the mean use of experts that balance terms ask for, one backward.

Logits are [N, H, E'], tokens and heads evenly spaced, columns adjacent; rows are (token, head), padding is left out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.triton_tiles import interpreted

FEWEST_IN_PARTS = 64
"""Fewer columns than this are sorted at once."""

LOWEST = tl.constexpr(-3e38)
"""Stands for a logit that is none: nothing is left of it in a softmax, and a row of it alone has no NaN."""


@triton.jit
def _starts(row, n_heads, stride_token, stride_head):
    """Where the rows begin."""
    return (row // n_heads).to(tl.int64) * stride_token + row % n_heads * stride_head


@triton.jit
def _logits(at, mask):
    return tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32), LOWEST)


@triton.jit
def _keys(
    logits, starts, here, first, n_experts, HALF: tl.constexpr, COLUMNS: tl.constexpr, RANGE: tl.constexpr
):
    """Unique keys of COLUMNS columns from `first` on: the ordered bits of the value above the reversed column.

    A column that is none comes after every value, NaN included, if only by its number: what is chosen always exists.
    """
    column = first + tl.arange(0, COLUMNS)
    exists = (column < n_experts)[None, :]
    value = tl.load(
        logits + starts[:, None] + column[None, :], mask=here[:, None] & exists, other=-float("inf")
    )
    if HALF:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        ordered = tl.where(exists, tl.where(bits < 0, bits ^ 0x7FFF, bits), -32768)
    else:
        bits = value.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        ordered = tl.where(exists, ordered, -2147483648)
    return ordered * RANGE + (RANGE - 1 - column)[None, :]


@triton.jit
def _choose(
    logits, index, gate, n_rows, n_heads, stride_token, stride_head, n_experts, top_k,
    SOFTMAX: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, RANGE: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Largest logits of each row by sorting keys: those of the first columns, then what is left with the next ones.

    PARTS: how many columns are sorted at a time, powers of two from CHOSEN up.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here, k = row < n_rows, tl.arange(0, CHOSEN)
    starts = _starts(row, n_heads, stride_token, stride_head)
    top = tl.topk(_keys(logits, starts, here, 0, n_experts, HALF, PARTS[0], RANGE), CHOSEN)
    first = PARTS[0]
    for part in tl.static_range(1, len(PARTS)):
        more = tl.topk(_keys(logits, starts, here, first, n_experts, HALF, PARTS[part], RANGE), CHOSEN)
        top = tl.topk(tl.join(top, more).reshape(ROWS, 2 * CHOSEN), CHOSEN)
        first += PARTS[part]
    chosen = RANGE - 1 - (top & (RANGE - 1)).to(tl.int32)
    high = (top - (top & (RANGE - 1))) // RANGE
    if HALF:
        score = tl.where(high < 0, high ^ 0x7FFF, high).to(tl.int16).to(logits.dtype.element_ty, bitcast=True)
    else:
        high = high.to(tl.int32)
        score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
    score = score.to(tl.float32)
    mask = (row < n_rows)[:, None] & (k < top_k)[None, :]
    if SOFTMAX:
        score = tl.where(mask, score, -1e38)
        raised = tl.exp(score - tl.max(score, 1)[:, None])
        weight = raised / tl.sum(raised, 1)[:, None]
    else:
        weight = 1 / (1 + tl.exp(-score))
    at = row.to(tl.int64)[:, None] * top_k + k[None, :]
    tl.store(index + at, chosen.to(tl.int64), mask=mask)
    tl.store(gate + at, weight, mask=mask)


@triton.jit
def _choose_backward(
    d_gate, d_usage, logits, index, gate, d_logits,
    n_rows, n_heads, rows_per_sequence, stride_token, stride_head, n_experts, width, top_k,
    GATES: tl.constexpr, USAGE: tl.constexpr, SOFTMAX: tl.constexpr,
    COLUMNS: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits, dense: that of the usage, or zeros, first; what was chosen on top."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < n_rows
    column, k = tl.arange(0, COLUMNS), tl.arange(0, CHOSEN)
    at = row.to(tl.int64)[:, None] * top_k + k[None, :]
    mask = here[:, None] & (k < top_k)[None, :]
    chosen = tl.load(index + at, mask=mask, other=0)
    out = d_logits + row.to(tl.int64)[:, None] * width
    whole = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad = tl.zeros((ROWS, CHOSEN), tl.float32)
    if USAGE:
        # p (d - p · d) for p = softmax(z): once for all columns, once for those that are written again
        starts = logits + _starts(row, n_heads, stride_token, stride_head)[:, None]
        usage = (
            d_usage + (row // rows_per_sequence * n_heads + row % n_heads).to(tl.int64)[:, None] * n_experts
        )
        inside = here[:, None] & (column < n_experts)[None, :]
        z = _logits(starts + column[None, :], inside)
        d = tl.load(usage + column[None, :], mask=inside, other=0.0)
        top = tl.max(z, 1)[:, None]
        raised = tl.exp(z - top)
        scale = 1 / tl.sum(raised, 1)[:, None]
        mean = tl.sum(raised * d, 1)[:, None] * scale
        whole = raised * scale * (d - mean)
        z_chosen = _logits(starts + chosen, mask)
        grad = tl.exp(z_chosen - top) * scale * (tl.load(usage + chosen, mask=mask, other=0.0) - mean)
    tl.store(
        out + column[None, :],
        whole.to(d_logits.dtype.element_ty),
        mask=here[:, None] & (column < width)[None, :],
    )
    if GATES:
        g = tl.load(gate + at, mask=mask, other=0.0)
        d_g = tl.load(d_gate + at, mask=mask, other=0.0)
        if SOFTMAX:
            grad += g * (d_g - tl.sum(g * d_g, 1)[:, None])
        else:
            grad += d_g * g * (1 - g)
        tl.debug_barrier()  # another thread of the program wrote what lies there
        tl.store(out + chosen, grad.to(d_logits.dtype.element_ty), mask=mask)


@triton.jit
def _usage(
    logits, parts, n_tokens, n_heads, stride_token, stride_head, n_experts, n_blocks,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """parts[b, block] = sum over ROWS · STEPS tokens of sequence b of softmax(logits)."""
    block, sequence = tl.program_id(0), tl.program_id(1)
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    inside = (head < n_heads)[:, None] & (column < n_experts)[None, :]
    at = head[:, None] * stride_head + column[None, :]
    total = tl.zeros((HEADS, COLUMNS), tl.float32)
    for step in range(STEPS):
        token = (block * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (token < n_tokens)[:, None, None] & inside[None, :, :]
        starts = (sequence * n_tokens + token).to(tl.int64) * stride_token
        z = _logits(logits + starts[:, None, None] + at[None, :, :], mask)
        raised = tl.exp(z - tl.max(z, 2)[:, :, None])
        share = raised / tl.sum(raised, 2)[:, :, None]
        total += tl.sum(tl.where(mask, share, 0.0), 0)
    out = parts + (sequence.to(tl.int64) * n_blocks + block) * n_heads * n_experts
    tl.store(out + head[:, None] * n_experts + column[None, :], total, mask=inside)


def _rows_at_once(columns: int) -> int:
    """Rows that one warp takes: about a thousand columns."""
    return 8 if interpreted() else min(64, max(1, 1024 // columns))


def _columns(n_experts: int) -> int:
    return max(2, triton.next_power_of_2(n_experts))


def _parts(n_experts: int, fewest: int) -> tuple[int, ...]:
    """Powers of two, none below `fewest`, that hold all experts: 565 in 512 + 64 columns, 387 in 256 + 128 + 16."""
    whole = max(fewest, _columns(n_experts))
    if whole < FEWEST_IN_PARTS or whole == fewest or 5 * n_experts > 4 * whole:
        return (whole,)
    return whole // 2, *_parts(n_experts - whole // 2, fewest)


def choose(logits: Tensor, top_k: int, n_experts: int, softmax: bool) -> tuple[Tensor, Tensor]:
    """Of logits [N, H, E']: index int64 [N, H, K] and gate float32 [N, H, K]."""
    n_tokens, n_heads, _ = logits.shape
    index = torch.empty(n_tokens, n_heads, top_k, dtype=torch.int64, device=logits.device)
    gate = torch.empty(n_tokens, n_heads, top_k, dtype=torch.float32, device=logits.device)
    n_rows, columns, chosen = n_tokens * n_heads, _columns(n_experts), triton.next_power_of_2(top_k)
    rows = _rows_at_once(columns)
    if n_rows:
        _choose[(triton.cdiv(n_rows, rows),)](
            logits, index, gate, n_rows, n_heads, logits.stride(0), logits.stride(1), n_experts, top_k,
            softmax, logits.dtype.itemsize == 2, _parts(n_experts, chosen), columns, chosen, rows, num_warps=1,
        )  # fmt: skip
    return index, gate


def usage(logits: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    """Of logits [N, H, E']: softmax over the first `n_experts` columns, summed by sequence, float32 [B, H, E]."""
    n_tokens, n_heads = logits.shape[0] // max(1, n_sequences), logits.shape[1]
    heads, columns = triton.next_power_of_2(n_heads), _columns(n_experts)
    rows = 4 if interpreted() else max(1, 2048 // (heads * columns))
    steps = 2 if interpreted() else triton.cdiv(32, rows)
    n_blocks = triton.cdiv(n_tokens, rows * steps)
    parts = torch.empty(n_sequences, n_blocks, n_heads, n_experts, dtype=torch.float32, device=logits.device)
    if parts.numel():
        _usage[(n_blocks, n_sequences)](
            logits, parts, n_tokens, n_heads, logits.stride(0), logits.stride(1), n_experts, n_blocks,
            heads, columns, rows, steps, num_warps=4,
        )  # fmt: skip
    return parts.sum(1)


def choose_backward(
    d_gate: Tensor | None,
    d_usage: Tensor | None,
    logits: Tensor | None,
    index: Tensor,
    gate: Tensor,
    width: int,
    dtype: torch.dtype,
    softmax: bool,
) -> Tensor:
    """Gradient of the logits, [N, H, width], from those of the gates [N, H, K] and of the usage [B, H, E]."""
    n_tokens, n_heads, top_k = index.shape
    n_rows = n_tokens * n_heads
    index, gate = index.contiguous(), gate.contiguous()
    d_gate = None if d_gate is None else d_gate.contiguous()
    d_logits = torch.empty(n_tokens, n_heads, width, dtype=dtype, device=index.device)
    n_experts, rows_per_sequence, strides = width, 1, (0, 0)
    if d_usage is not None:
        d_usage, n_experts = d_usage.contiguous(), d_usage.shape[2]
        rows_per_sequence, strides = n_rows // max(1, d_usage.shape[0]), (logits.stride(0), logits.stride(1))
    columns = triton.next_power_of_2(width)
    rows = _rows_at_once(columns)
    if n_rows:
        _choose_backward[(triton.cdiv(n_rows, rows),)](
            d_gate, d_usage, logits, index, gate, d_logits,
            n_rows, n_heads, rows_per_sequence, *strides, n_experts, width, top_k,
            d_gate is not None, d_usage is not None, softmax,
            columns, triton.next_power_of_2(top_k), rows, num_warps=1,
        )  # fmt: skip
    return d_logits
