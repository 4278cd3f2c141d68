"""Routing preparation: from chosen experts to slots grouped by expert.

A slot is one (token, group, choice). The plan holds one permutation of the slots and its inverse; rows of every
intermediate lie in expert order, and nothing is ever scattered by atomics: reads gather, sums gather.
Legend: N tokens, H groups (heads, or 1), K choices, S = N·H·K slots, E experts, P pairs of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeut_kernels.backend import resolve

TILE_ROWS = 128
"""Rows of an entry of the tile table; kernels with smaller tiles cut each entry into equal parts."""

CHUNK_ROWS = 2048
"""Rows of an entry of the second table, for programs that walk over the rows of an expert."""

RADIX_FROM = 32768
"""From so many integers on PyTorch sorts on a CPU by radix: 32768 take half the time of 16384."""

MOST_PAIRS = 2048
"""Pairs are grouped only up to this many: beyond it a pair has too few rows to fill a tile."""


@dataclass(frozen=True)
class Plan:
    """Slots grouped by expert. Prepared once per routing, shared by every product that uses it, never changed.

    index: [N, H, K] chosen experts. slots: int32 [S], slots in expert order, stable. position: int32 [S], the inverse:
    where a slot lies in expert order. offsets: int32 [E + 1], first row of each expert. The rest serves Triton and is
    empty elsewhere: tiles: int32 [T, 4], two tables of row tiles (expert twice or -1, first row, end of the expert), of
    128 rows (where experts have many: all their earlier halves before the later ones) and of 2048. low_slots: int32
    [N·H], where K = 2: of every (token, group) item, ordered by pair of experts, the slot with the lower expert; the
    other differs in the last bit. pair_tiles: int32 [T', 4], the same two tables for pairs (lower and higher expert,
    first item, end of the pair).
    """

    index: Tensor
    slots: Tensor
    position: Tensor
    offsets: Tensor
    tiles: Tensor
    low_slots: Tensor
    pair_tiles: Tensor

    @property
    def n_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What every op takes of a plan, in order."""
        return self.index, self.slots, self.position, self.offsets, self.tiles

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """What `expert_split` and `expert_merge` take besides."""
        return self.low_slots, self.pair_tiles


def plan(index: Tensor, n_experts: int, *, disjoint: bool = False) -> Plan:
    """Group the slots of a routing by expert, on the device, without a host synchronisation on CUDA.

    index: [N, H, K] integers in [0, n_experts); other values are an error on CPU and undefined behaviour on CUDA.
    disjoint: every group has experts of its own, group h those of [h · n_experts / H, (h + 1) · n_experts / H), as the
    heads of SwitchHead do; it only makes the pairs fewer. Raises `ValueError` for a wrong rank or dtype, fewer than
    one expert, or disjoint groups that do not share the experts evenly.
    """
    if torch.jit.is_tracing():
        return Plan(index, *torch.ops.moeut.plan(index, n_experts, n_experts, resolve(index)))
    if index.dim() != 3:
        raise ValueError(f"index must be [N, H, K], got shape {tuple(index.shape)}")
    if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise ValueError(f"index must hold integers, got dtype {index.dtype}")
    if n_experts < 1:
        raise ValueError(f"n_experts={n_experts} must be at least 1")
    n_groups = index.shape[1]
    if disjoint and n_experts % n_groups:
        raise ValueError(f"n_experts={n_experts} must be a multiple of the {n_groups} disjoint groups")
    n_local = n_experts // n_groups if disjoint else n_experts
    return Plan(index, *torch.ops.moeut.plan(index, n_experts, n_local, resolve(index)))


def slots_per_row(merge: bool, index: Tensor, *, apart: bool = False) -> tuple[int, int]:
    """How many slots read one input row, and how many add up in one output row, of a product with `index` [N, H, K].

    A split reads a token for all groups and adds up one group, a merge the other way round. apart: the side of whole
    tokens is taken group by group, too.
    """
    _, n_groups, top_k = index.shape
    of_token = top_k if apart else n_groups * top_k
    return (top_k, of_token) if merge else (of_token, top_k)


def n_tiles(n_slots: int, n_experts: int, rows: int = TILE_ROWS) -> int:
    """Upper bound of row tiles: full ones, and one ragged tile for each expert that can have a slot."""
    return n_slots // rows + min(n_experts, n_slots)


def n_entries(n_slots: int, n_experts: int) -> int:
    """Entries of both tables, the one of tiles and the one of chunks behind it."""
    return n_tiles(n_slots, n_experts) + n_tiles(n_slots, n_experts, CHUNK_ROWS)


def n_pairs(index: Tensor, n_experts: int, n_local: int, backend: str) -> int:
    """Number of unordered pairs of experts if items are to be grouped by pair, else 0.

    With two choices per (token, group) both experts' products belong to the same input and output row: a program that
    does both gathers once and writes once.
    """
    pairs = n_experts // n_local * (n_local * (n_local + 1) // 2)
    return (
        pairs
        if backend == "triton" and index.shape[1] > 1 and index.shape[2] == 2 and pairs <= MOST_PAIRS
        else 0
    )


def _order(flat: Tensor, n_experts: int) -> Tensor:
    """Stable order of chosen experts.

    On a CPU many are filled up to as many as PyTorch sorts by radix, which takes a quarter of the time for bytes.
    """
    n = flat.numel()
    if flat.device.type == "cpu" and n >= RADIX_FROM // 4:
        flat = flat.to(torch.uint8 if n_experts < 256 else torch.int32)
        flat = torch.nn.functional.pad(flat, (0, max(0, RADIX_FROM - n)), value=n_experts)
    return flat.argsort(stable=True)[:n]


@torch.library.custom_op(
    "moeut::plan",
    mutates_args=(),
    schema="(Tensor index, int n_experts, int n_local, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _plan(index: Tensor, n_experts: int, n_local: int, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton":
        from moeut_kernels import triton_routing

        return triton_routing.plan(index, n_experts, n_local, n_pairs(index, n_experts, n_local, backend))
    flat = index.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < n_experts:
        raise ValueError(f"index holds values outside [0, {n_experts})")
    slots = _order(flat, n_experts)
    position = torch.empty_like(slots, dtype=torch.int32)
    position.scatter_(0, slots, torch.arange(flat.numel(), dtype=torch.int32, device=flat.device))
    offsets = torch.zeros(n_experts + 1, dtype=torch.int32, device=flat.device)
    torch.cumsum(torch.bincount(flat, minlength=n_experts), 0, dtype=torch.int32, out=offsets[1:])
    none = (offsets.new_empty(shape) for shape in ((0, 4), (0,), (0, 4)))
    return slots.int(), position, offsets, *none


@_plan.register_fake
def _(index: Tensor, n_experts: int, n_local: int, backend: str) -> tuple[Tensor, ...]:
    n_slots, pairs = index.numel(), n_pairs(index, n_experts, n_local, backend)
    n_items = n_slots // 2 if pairs else 0
    shapes = (
        (n_slots,),
        (n_slots,),
        (n_experts + 1,),
        (n_entries(n_slots, n_experts) if backend == "triton" else 0, 4),
        (n_items,),
        (n_entries(n_items, pairs), 4),
    )
    return tuple(index.new_empty(shape, dtype=torch.int32) for shape in shapes)
