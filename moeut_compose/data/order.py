"""Which windows a training step sees: a pure function of seed and step.

Nothing is remembered between steps, and neither workers nor the number of processes enter, so resuming
anywhere gives the same data to the same step.
"""

from __future__ import annotations

from typing import Literal, assert_never

Order = Literal["streams", "shuffled"]

_MASK = 2**64 - 1
_N_ROUNDS = 6


def windows_of_step(step: int, batch_size: int, n_windows: int, seed: int, order: Order) -> list[int]:
    """The windows of 0-based step `step`, in batch order.

    `streams` is the published order: `batch_size` contiguous streams of `n = n_windows // batch_size` windows
    side by side, of which step p takes window `p + i*n` of each stream i; after n steps it starts again.
    `shuffled` deals out permutations of all windows, another one each epoch; a batch may span two epochs.

    Raises `ValueError` if the data is shorter than one batch of streams, or empty.
    """
    if n_windows < 1:
        raise ValueError("there is no training window: the text is shorter than one context")
    match order:
        case "streams":
            n = n_windows // batch_size
            if n == 0:
                raise ValueError(
                    f"{n_windows} windows cannot fill {batch_size} streams; "
                    f"use order: shuffled or batch.size={n_windows}"
                )
            return [step % n + stream * n for stream in range(batch_size)]
        case "shuffled":
            first = step * batch_size
            return [_dealt(position, n_windows, seed) for position in range(first, first + batch_size)]
        case _:
            assert_never(order)


def _dealt(position: int, n_windows: int, seed: int) -> int:
    epoch, index = divmod(position, n_windows)
    return permuted(index, n_windows, key=_mix(_mix(seed) ^ epoch))


def permuted(index: int, size: int, *, key: int) -> int:
    """Element `index` of a pseudo-random permutation of `range(size)`, without making the permutation.

    A balanced Feistel network permutes the next power of four; numbers outside the range are sent through
    again until they fall into it (cycle walking), which keeps it a permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_N_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (right << 8 | turn)) & low)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """A 64-bit hash (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
