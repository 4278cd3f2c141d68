"""Routing preparation on the device, without host synchronisation: a stable counting sort and tile tables.

The sort is three kernels and one scan: counts of each group in each block of slots, their running sum, and the place of
every slot. Nothing is atomic, so the order repeats. Legend: S slots, G groups (experts, or pairs of experts).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeut_kernels.plan import CHUNK_ROWS, TILE_ROWS, n_tiles
from moeut_kernels.triton_tiles import interpreted

HALVES_FROM = 4
"""With this many full tiles an expert on average, tiles come in two halves, early tokens first: rows that experts
gather then come from the cache more often, and each expert's weights are read twice instead of once."""


@triton.jit
def _first_pair(low, n_local):
    return low * (2 * n_local - low + 1) // 2


@triton.jit
def _count(
    index, keys, counts, n_slots, n_local, n_groups, n_blocks,
    PAIRS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keys[s]: group · BLOCK + place in its block, and counts[g, b]: how many slots of block b belong to group g.

    The group is the expert. With PAIRS a slot is an item of two choices, and its group the rank of its unordered pair
    among all: (0,0), (0,1) ... (1,1), (1,2) ... Pairs lie within blocks of n_local experts; ranks go on across blocks.
    """
    b = tl.program_id(0)
    slot = b * BLOCK + tl.arange(0, BLOCK)
    mask = slot < n_slots
    if PAIRS:
        first = tl.load(index + 2 * slot, mask=mask, other=0).to(tl.int32)
        second = tl.load(index + 2 * slot + 1, mask=mask, other=0).to(tl.int32)
        low = tl.minimum(first, second)
        base = low // n_local
        start = base * (n_local * (n_local + 1) // 2) + _first_pair(low - base * n_local, n_local)
        key = tl.where(mask, start + tl.maximum(first, second) - low, n_groups)
    else:
        key = tl.load(index + slot, mask=mask, other=n_groups).to(tl.int32)
    tl.store(keys + slot, key * BLOCK + tl.arange(0, BLOCK), mask=mask)
    g = tl.arange(0, GROUPS)
    tl.store(counts + g.to(tl.int64) * n_blocks + b, tl.histogram(key, GROUPS), mask=g < n_groups)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _place(
    index, keys, counts, ends, slots, position, n_slots, n_groups, n_blocks,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Place of a slot: where its (group, block) starts, plus its rank among equals in the block.

    With PAIRS what is placed is, for each item, its slot with the lower expert.

    Keys hold group · BLOCK + i: sorted, equals lie together and in their order, so the rank is the way back to the
    first of them.
    """
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    beyond = n_groups * BLOCK
    key = tl.sort(tl.load(keys + b * BLOCK + i, mask=b * BLOCK + i < n_slots, other=beyond))
    group = key // BLOCK
    group_before = tl.gather(key, tl.maximum(i - 1, 0), 0) // BLOCK
    first = tl.associative_scan(tl.where(group != group_before, i, 0), 0, _later)
    slot = b * BLOCK + key % BLOCK
    mask = group < n_groups
    cell = group.to(tl.int64) * n_blocks + b
    start = tl.load(ends + cell, mask=mask, other=0) - tl.load(counts + cell, mask=mask, other=0)
    place = start + i - first
    if PAIRS:
        one = tl.load(index + 2 * slot, mask=mask, other=0)
        two = tl.load(index + 2 * slot + 1, mask=mask, other=0)
        tl.store(slots + place, 2 * slot + (one > two).to(tl.int32), mask=mask)
    else:
        tl.store(slots + place, slot, mask=mask)
        tl.store(position + slot, place, mask=mask)


@triton.jit
def _experts_of(group, n_local, PAIRS: tl.constexpr):
    """Lower and higher expert of a group. The root that inverts the rank of a pair is corrected for its rounding."""
    if PAIRS:
        n_pairs = n_local * (n_local + 1) // 2
        base, rank = group // n_pairs * n_local, group % n_pairs
        twice = 2.0 * n_local + 1.0
        root = tl.sqrt(tl.maximum(twice * twice - 8.0 * rank.to(tl.float32), 0.0))
        low = ((twice - root) * 0.5).to(tl.int32)
        low = tl.where(_first_pair(low, n_local) > rank, low - 1, low)
        low = tl.where(_first_pair(low + 1, n_local) <= rank, low + 1, low)
        group_low, group_high = base + low, base + low + rank - _first_pair(low, n_local)
    else:
        group_low, group_high = group, group
    return group_low, group_high


@triton.jit
def _cut(
    ends, offsets, table, n_local, n_groups, n_blocks, n_fine, n_coarse, fine_rows, coarse_rows,
    PAIRS: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cut every group into tiles: lower and higher expert (-1: unused), first row, end of the group.

    n_fine entries of tiles of fine_rows rows, then n_coarse entries of tiles of coarse_rows. HALVES: of the fine tiles
    first the earlier half of every group, then the later halves.
    """
    g = tl.arange(0, GROUPS)
    here = g < n_groups
    end = tl.load(ends + (g + 1).to(tl.int64) * n_blocks - 1, mask=here, other=0)
    start = tl.load(ends + g.to(tl.int64) * n_blocks - 1, mask=here & (g > 0), other=0)
    if tl.program_id(0) == 0:
        tl.store(offsets + g, start, mask=here)
        tl.store(offsets + g + 1, end, mask=g == n_groups - 1)
    fine_blocks = tl.cdiv(n_fine, BLOCK)
    fine = tl.program_id(0) < fine_blocks
    rows = tl.where(fine, fine_rows, coarse_rows)
    n_entries = tl.where(fine, n_fine, n_coarse)
    t = (tl.program_id(0) - tl.where(fine, 0, fine_blocks)) * BLOCK + tl.arange(0, BLOCK)
    entry = table + 4 * (tl.where(fine, 0, n_fine) + t)
    count = tl.where(here, (end - start + rows - 1) // rows, 0)
    early = tl.where(HALVES & fine, (count + 1) // 2, count)
    n_early = tl.sum(early)
    late = t >= n_early
    early_last, late_last = tl.cumsum(early, 0), tl.cumsum(count - early, 0)
    place = tl.where(late, t - n_early, t)
    last = tl.where(late[:, None], late_last[None, :], early_last[None, :])
    owner = tl.sum(((last <= place[:, None]) & here[None, :]).to(tl.int32), 1)
    mine = g[None, :] == owner[:, None]
    skipped = tl.where(late[:, None], (late_last - count)[None, :], (early_last - early)[None, :])
    tile = place - tl.sum(tl.where(mine, skipped, 0), 1)
    row = tl.sum(tl.where(mine, start[None, :], 0), 1) + tile * rows
    stop = tl.sum(tl.where(mine, end[None, :], 0), 1)
    used, mask = owner < n_groups, t < n_entries
    low, high = _experts_of(owner, n_local, PAIRS)
    tl.store(entry, tl.where(used, low, -1), mask=mask)
    tl.store(entry + 1, tl.where(used, high, -1), mask=mask)
    tl.store(entry + 2, tl.where(used, row, 0), mask=mask)
    tl.store(entry + 3, tl.where(used, stop, 0), mask=mask)


def _sort(
    index: Tensor, n_slots: int, n_local: int, n_groups: int, *, pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stable counting sort and the tile tables: (slots, position, offsets, tables in one)."""
    block, entries = (32, 64) if interpreted() else (512, 16)
    groups, n_blocks = triton.next_power_of_2(n_groups + 1), max(1, triton.cdiv(n_slots, block))
    n_fine, n_coarse = n_tiles(n_slots, n_groups), n_tiles(n_slots, n_groups, CHUNK_ROWS)

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=index.device)

    keys, counts, slots, position = ints(n_slots), ints(n_groups * n_blocks), ints(n_slots), ints(n_slots)
    offsets, table = ints(n_groups + 1), ints(n_fine + n_coarse, 4)
    _count[(n_blocks,)](
        index, keys, counts, n_slots, n_local, n_groups, n_blocks, pairs, groups, block, num_warps=4
    )
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    _place[(n_blocks,)](
        index, keys, counts, ends, slots, position, n_slots, n_groups, n_blocks, pairs, block, num_warps=4
    )
    grid = (max(1, triton.cdiv(n_fine, entries) + triton.cdiv(n_coarse, entries)),)
    _cut[grid](
        ends, offsets, table, n_local, n_groups, n_blocks, n_fine, n_coarse, TILE_ROWS, CHUNK_ROWS,
        pairs, not pairs and n_slots >= HALVES_FROM * TILE_ROWS * n_groups, groups, entries, num_warps=4,
    )  # fmt: skip
    return slots, position, offsets, table


def plan(index: Tensor, n_experts: int, n_local: int, n_pairs: int) -> tuple[Tensor, ...]:
    """Body of `moeut::plan`: slots by expert, and (token, group) items by pair of experts if n_pairs > 0."""
    flat = index.reshape(-1)
    slots, position, offsets, tiles = _sort(flat, flat.numel(), n_experts, n_experts, pairs=False)
    if n_pairs == 0:
        return slots, position, offsets, tiles, offsets.new_empty(0), offsets.new_empty(0, 4)
    low_slots, _, _, pair_tiles = _sort(flat, flat.numel() // 2, n_local, n_pairs, pairs=True)
    return slots, position, offsets, tiles, low_slots, pair_tiles
