"""How the plain PyTorch path lays rows out while experts multiply them: in expert order, or in tiles.

In expert order there is one matrix product for each expert. Where experts have little to do, most of the time goes into
starting products, and many cores wait for the slowest in every one of them. Tiles have equally many rows, those of one
expert each, so that one batched product takes a tile of every expert; the last tile of an expert is filled up.
Legend: S slots, E experts, T tiles, R rows (S, or all rows of the tiles), D columns in, F columns out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moeut_kernels import reference

MOST_RANKS = 8
"""An expert has at most so many tiles."""

RANK_COST = 0.02
"""What one more tile of an expert costs, a product and its start: this part of all rows."""

MOST_FILLING = 2.0
"""Tiles have at most so many times as many rows as there are slots; expert order takes over where they need more."""


def lay_out(slots: Tensor, position: Tensor, offsets: Tensor, backend: str) -> "Layout":
    """The layout in which `backend` multiplies the rows of these slots; arguments as in `Plan`.

    That of "bmm" depends on how many slots each expert has, so a backward may see another one than its forward: what
    passes between them is `packed`.
    """
    if backend != "bmm":
        return Layout(slots, position, offsets, backend)
    rows = _tile_rows(offsets.diff().tolist())
    return Tiles(slots, position, offsets, rows) if rows else Layout(slots, position, offsets, "grouped_mm")


def _tile_rows(counts: list[int]) -> int:
    """Rows of a tile for experts with so many slots; 0 where tiles would be mostly filling."""
    n_slots, most = sum(counts), max(counts)
    least, best = float("inf"), 0
    for n_ranks in range(1, min(MOST_RANKS, most) + 1):
        rows = -(-most // n_ranks)
        total = rows * sum(-(-count // rows) for count in counts)
        cost = total * (1 + RANK_COST * n_ranks)
        if total <= MOST_FILLING * n_slots and cost < least:
            least, best = cost, rows
    return best


class Layout:
    """Rows in expert order, those of an expert side by side.

    slots: int32 [R], the slot of every row. position: [S], the row of every slot.
    """

    def __init__(self, slots: Tensor, position: Tensor, offsets: Tensor, backend: str) -> None:
        self.slots, self.position, self.offsets, self.backend = slots, position, offsets, backend

    def gates(self, gate: Tensor | None) -> Tensor | None:
        """The gate of every row as a column [R, 1], zero for rows that are no slot's; None: all ones.

        gate: [N, H, K], None for ones.
        """
        return None if gate is None else gate.reshape(-1).index_select(0, self.slots).unsqueeze(1)

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Each row times the matrix of its expert: rows [R, D], weight [E, D, F] -> [R, F]."""
        return reference.grouped_rows(rows, weight, self.offsets, self.backend)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum of outer products over each expert's rows: left [R, D], right [R, F] -> [E, D, F].

        Rows that are no slot's have to be zero on one side.
        """
        return reference.grouped_outer(left, right, self.offsets, self.backend)

    def packed(self, rows: Tensor) -> Tensor:
        """Rows [R, D] of this layout in expert order, [S, D]."""
        return rows

    def spread(self, rows: Tensor) -> Tensor:
        """Rows [S, D] in expert order in this layout, [R, D]."""
        return rows


class Tiles(Layout):
    """Rows in tiles, each of one expert: first a tile of every expert that has a row, then of all that have more.

    Experts with most tiles come first, so a product takes as many matrices from the first on as there are tiles. An
    expert's last row is repeated where its last tile is not full.
    """

    def __init__(self, slots: Tensor, position: Tensor, offsets: Tensor, tile_rows: int) -> None:
        self.tile_rows = tile_rows
        n_tiles = (offsets.diff() + (tile_rows - 1)) // tile_rows
        order = n_tiles.argsort(descending=True, stable=True)
        n_ranks = int(n_tiles[order[0]])
        ranks = torch.arange(n_ranks)
        self.widths: list[int] = (n_tiles > ranks.unsqueeze(1)).sum(1).tolist()
        order = order[: self.widths[0]]
        self.experts = None if n_ranks == 1 and order.shape[0] == n_tiles.shape[0] else order

        of_tile = torch.cat([order[:width] for width in self.widths])
        rank = ranks.repeat_interleave(torch.tensor(self.widths))
        starts = offsets.index_select(0, of_tile) + rank * tile_rows
        ends = offsets[1:].index_select(0, of_tile)
        ordered = starts.unsqueeze(1) + torch.arange(tile_rows)
        self.is_slot = (ordered < ends.unsqueeze(1)).view(-1, 1)
        self.source = torch.minimum(ordered, ends.unsqueeze(1) - 1).view(-1)

        first_rows = torch.arange(0, ordered.numel(), tile_rows)
        by_start = starts.argsort()
        shift, lengths = (first_rows - starts)[by_start], (ends - starts).clamp_(max=tile_rows)[by_start]
        n_slots = slots.shape[0]
        self.place = shift.repeat_interleave(lengths, output_size=n_slots)
        self.place += torch.arange(n_slots)
        super().__init__(
            slots.index_select(0, self.source), self.place.index_select(0, position), offsets, "bmm"
        )

    def gates(self, gate: Tensor | None) -> Tensor:
        gates = super().gates(gate)
        return self.is_slot if gates is None else gates * self.is_slot

    @torch.autocast("cpu", enabled=False)
    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        matrices = self._chosen(weight)
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for tiles, products in zip(self._ranks(rows), self._ranks(out), strict=True):
            torch.bmm(tiles, matrices[: tiles.shape[0]], out=products)
        return out

    @torch.autocast("cpu", enabled=False)
    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        lefts, rights = self._ranks(left), self._ranks(right)
        sums = torch.bmm(next(lefts).transpose(1, 2), next(rights))
        for a, b in zip(lefts, rights, strict=True):
            sums[: a.shape[0]].baddbmm_(a.transpose(1, 2), b)
        if self.experts is None:
            return sums
        out = sums.new_zeros(self.offsets.shape[0] - 1, *sums.shape[1:])
        return out.index_copy_(0, self.experts, sums)

    def packed(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.place)

    def spread(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.source)

    def _ranks(self, rows: Tensor) -> Iterator[Tensor]:
        """The tiles of each rank [experts, rows, D]."""
        first = 0
        for width in self.widths:
            last = first + width * self.tile_rows
            yield rows[first:last].view(width, self.tile_rows, rows.shape[1])
            first = last

    def _chosen(self, weight: Tensor) -> Tensor:
        """The matrices of the experts that have tiles, transposed in memory where the weight is."""
        if self.experts is None:
            return weight
        if weight.stride(2) == 1:
            return weight.index_select(0, self.experts)
        return weight.transpose(1, 2).index_select(0, self.experts).transpose(1, 2)
