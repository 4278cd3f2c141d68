"""Choosing the next token on the device: filters and draw of one row of logits in one program.

Thresholds are found by bisection over the ordered bits of the logits, without sorting. The draw adds Gumbel noise and
takes the largest: noise is a function of the seed of the row and of the position alone.
"""

import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 65536
"""Widest row that one program holds."""


@triton.jit
def _ordered(value):
    """Integers in the order of float32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _choose(
    logits, seen, position, tokens, written, seeds, settings, n_columns, room,
    GREEDY: tl.constexpr, PENALTY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row: choose, write the token down, move on by one position."""
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    here = column < n_columns
    value = tl.load(logits + tl.cast(row, tl.int64) * n_columns + column, mask=here, other=-float("inf"))
    place = tl.load(position + row) + 1
    if PENALTY:
        penalty = tl.load(settings)
        known = tl.load(seen + tl.cast(row, tl.int64) * n_columns + column, mask=here, other=0) != 0
        value = tl.where(known, tl.where(value > 0, value / penalty, value * penalty), value)
    if not GREEDY:
        value = value / tl.load(settings + 1)
        if TOP_K:
            wanted = tl.load(settings + 2)
            key = _ordered(value)
            low = tl.min(tl.where(here, key, 0x7FFFFFFF), 0).to(tl.int64)
            high = tl.max(tl.where(here, key, -0x7FFFFFFF), 0).to(tl.int64) + 1
            for _ in range(33):  # `low` is the largest key that `wanted` columns reach
                middle = (low + high) // 2
                enough = tl.sum(tl.where(here & (key >= middle), 1.0, 0.0), 0) >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            value = tl.where(here & (key >= low), value, -float("inf"))
        if TOP_P:
            wanted = tl.load(settings + 3)
            raised = tl.exp(value - tl.max(value, 0))
            probability = raised / tl.sum(raised, 0)
            key = _ordered(value)
            low = tl.min(tl.where(raised > 0, key, 0x7FFFFFFF), 0).to(tl.int64) - 1
            high = tl.max(tl.where(here, key, -0x7FFFFFFF), 0).to(tl.int64)
            for _ in range(33):  # `high` is the smallest key above which there is too little
                middle = (low + high) // 2
                enough = tl.sum(tl.where(key > middle, probability, 0.0), 0) >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            value = tl.where(here & (key >= high), value, -float("inf"))
        if MIN_P:
            raised = tl.exp(value - tl.max(value, 0))
            value = tl.where(raised >= tl.load(settings + 4), value, -float("inf"))
        offset = (place * n_columns + column).to(tl.int32)
        uniform = tl.minimum(tl.maximum(tl.rand(tl.load(seeds + row), offset), 1e-10), 0.9999999)
        value = value - tl.log(-tl.log(uniform))
    best = tl.max(value, 0)
    token = tl.min(tl.where(here & (value == best), column, COLUMNS - 1), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(written + row * room + place, token.to(tl.int64))
    tl.store(position + row, place)
    if PENALTY:
        tl.store(seen + tl.cast(row, tl.int64) * n_columns + token, 1)


def choose(
    logits: Tensor,
    seen: Tensor | None,
    position: Tensor,
    tokens: Tensor,
    written: Tensor,
    seeds: Tensor,
    settings: Tensor,
    uses: tuple[bool, bool, bool, bool, bool],
) -> None:
    """Body of `sampling.choose_tokens`; uses: greedy, penalty, top-k, top-p, min-p."""
    n_rows, n_columns = logits.shape
    columns = max(16, triton.next_power_of_2(n_columns))
    warps = 4 if columns <= 1024 else 8 if columns <= 4096 else 16 if columns <= 8192 else 32
    _choose[(n_rows,)](
        logits, seen, position, tokens, written, seeds, settings, n_columns, written.shape[1],
        *uses, columns, num_warps=warps,
    )  # fmt: skip
