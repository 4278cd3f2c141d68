"""Routing preparation: from chosen experts to slots grouped by expert.

A slot is one (token, group, choice). The plan holds one permutation of the slots and its inverse; rows of every
intermediate lie in expert order, and nothing is ever scattered by atomics: reads gather, sums gather.
Legend: N tokens, H groups (heads, or 1), K choices, S = N·H·K slots, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeut_kernels.backend import resolve

TILE_ROWS = 128
"""Rows of a tile in the tile table; kernels with smaller tiles cut each entry into equal parts."""


@dataclass(frozen=True)
class Plan:
    """Slots grouped by expert. Prepared once per routing, shared by every product that uses it, never changed.

    index: [N, H, K] chosen experts. slots: int32 [S], slots in expert order, stable. position: int32 [S], the inverse:
    where a slot lies in expert order. offsets: int32 [E + 1], first row of each expert. tiles: int32 [T, 2], the
    expert and first row of each row tile (expert -1: unused), empty where the backend needs none.
    """

    index: Tensor
    slots: Tensor
    position: Tensor
    offsets: Tensor
    tiles: Tensor

    @property
    def n_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tensors in the order that the ops take them."""
        return self.index, self.slots, self.position, self.offsets, self.tiles


def plan(index: Tensor, n_experts: int) -> Plan:
    """Group the slots of a routing by expert, on the device, without a host synchronisation.

    index: [N, H, K] integers in [0, n_experts). Out-of-range values are undefined behaviour on CUDA.
    Raises `ValueError` for a wrong rank or dtype, or fewer than one expert.
    """
    if not torch.jit.is_tracing():
        if index.dim() != 3:
            raise ValueError(f"index must be [N, H, K], got shape {tuple(index.shape)}")
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
            raise ValueError(f"index must hold integers, got dtype {index.dtype}")
        if n_experts < 1:
            raise ValueError(f"n_experts={n_experts} must be at least 1")
    return Plan(index, *torch.ops.moeut.plan(index, n_experts, resolve(index)))


def n_tiles(n_slots: int, n_experts: int, tile_rows: int = TILE_ROWS) -> int:
    """Upper bound of row tiles: full ones, and one ragged tile for each expert that can have a slot."""
    return n_slots // tile_rows + min(n_experts, n_slots)


@torch.library.custom_op(
    "moeut::plan",
    mutates_args=(),
    schema="(Tensor index, int n_experts, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _plan(index, n_experts, backend):
    if backend == "triton":
        from moeut_kernels import triton_routing

        return triton_routing.plan(index, n_experts)
    flat = index.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < n_experts:
        raise ValueError(f"index holds values outside [0, {n_experts})")
    slots = flat.argsort(stable=True)
    position = torch.empty_like(slots, dtype=torch.int32)
    position[slots] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    offsets = torch.zeros(n_experts + 1, dtype=torch.int32, device=flat.device)
    torch.cumsum(torch.bincount(flat, minlength=n_experts), 0, dtype=torch.int32, out=offsets[1:])
    return slots.int(), position, offsets, offsets.new_empty(0, 2)


@_plan.register_fake
def _(index, n_experts, backend):
    n_slots = index.numel()
    rows = n_tiles(n_slots, n_experts) if backend == "triton" else 0
    slots = index.new_empty(n_slots, dtype=torch.int32)
    offsets = index.new_empty(n_experts + 1, dtype=torch.int32)
    return slots, torch.empty_like(slots), offsets, offsets.new_empty(rows, 2)
