"""Tile sizes of the Triton kernels, by class of device and dtype. Nothing is tuned while a model runs.

A device class is read off the shared memory that one block may use: "large" from 160 KiB (A100, H100 and later data
centre parts), else "small". float32 is multiplied by ordinary arithmetic (no tf32), with smaller tiles. Under Triton's
interpreter all tiles are tiny, so that small tests still cross tile borders. In half precision a product takes the tile
that was measured on this model of device instead, if someone ran the tuning command here (`tuned_tiles`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from moeut_kernels import tuned_tiles


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one step of a product, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# Products, named by what they do. "gather": gathered rows, long depth, narrow output; "gather_heavy" also
# keeps the pre-activation, or masks ragged sides. "gather_backward(_heavy)": with the derivative of the activation.
# "walk": a column slice of the weights stays, the rows of the expert pass by. "weight": weight gradients,
# "weight_uses": those of several uses at once.
# "pair_narrow", "pair_wide": two experts at once; "pair_wide" walks as well.
# float32 has neither walks nor pairs: without tensor cores a program cannot hold a whole side of a matrix.
_LARGE = {
    "gather": Tile(128, 128, 64, 8, 3),
    "gather_heavy": Tile(128, 128, 64, 8, 3),
    "gather_backward": Tile(64, 128, 64, 4, 4),
    "gather_backward_heavy": Tile(64, 128, 64, 8, 4),
    "walk": Tile(64, 128, 0, 4, 4),
    "weight": Tile(128, 128, 32, 4, 5),
    "weight_uses": Tile(128, 128, 32, 4, 5),
    "pair_narrow": Tile(128, 128, 64, 8, 4),
    "pair_narrow_backward": Tile(128, 128, 64, 8, 4),
    "pair_wide": Tile(64, 128, 0, 8, 3),
}
_SMALL = {
    "gather": Tile(128, 64, 32, 4, 3),
    "gather_heavy": Tile(64, 64, 32, 4, 3),
    "gather_backward": Tile(64, 64, 32, 4, 3),
    "gather_backward_heavy": Tile(64, 64, 32, 4, 3),
    "walk": Tile(64, 64, 0, 4, 2),
    "weight": Tile(64, 64, 32, 4, 3),
    "weight_uses": Tile(64, 64, 32, 4, 3),
    "pair_narrow": Tile(64, 128, 32, 4, 3),
    "pair_narrow_backward": Tile(64, 128, 32, 8, 3),
    "pair_wide": Tile(64, 64, 0, 4, 2),
}
_FLOAT32 = {
    "gather": Tile(64, 64, 32, 4, 2),
    "gather_heavy": Tile(64, 64, 32, 4, 2),
    "gather_backward": Tile(64, 64, 32, 4, 2),
    "gather_backward_heavy": Tile(64, 64, 32, 4, 2),
    "weight": Tile(64, 64, 32, 4, 2),
    "weight_uses": Tile(64, 64, 32, 4, 2),
}
_INTERPRETED = {
    "gather": Tile(64, 16, 16, 4, 1),
    "gather_heavy": Tile(64, 16, 16, 4, 1),
    "gather_backward": Tile(64, 16, 16, 4, 1),
    "gather_backward_heavy": Tile(64, 16, 16, 4, 1),
    "walk": Tile(64, 16, 0, 4, 1),
    "weight": Tile(16, 16, 32, 4, 1),
    "weight_uses": Tile(16, 16, 32, 4, 1),
    "pair_narrow": Tile(64, 16, 16, 4, 1),
    "pair_narrow_backward": Tile(64, 16, 16, 4, 1),
    "pair_wide": Tile(64, 16, 0, 4, 1),
}
_overrides: dict[str, Tile] = {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return isinstance(_probe, InterpretedFunction)


@triton.jit
def _probe():
    pass


@cache
def _device_class(device: torch.device) -> str:
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "large" if shared >= 160 * 1024 else "small"


def tile(product: str, x: torch.Tensor) -> Tile:
    """The tile of a product for operands like `x`."""
    if product in _overrides:
        return _overrides[product]
    if interpreted():
        return _INTERPRETED[product]
    if x.dtype == torch.float32:
        return _FLOAT32[product]
    return _half_precision(x.device)[product]


def static_tiles(device: torch.device) -> dict[str, Tile]:
    """What products in half precision take on a CUDA device where nobody has tuned."""
    return _LARGE if _device_class(device) == "large" else _SMALL


@cache
def _half_precision(device: torch.device) -> dict[str, Tile]:
    """The static tiles, and over them those tuned for this model of device: looked up once a process."""
    tuned = tuned_tiles.in_use(device)
    found = {} if tuned is None else {name: Tile(*sizes) for name, sizes in tuned.tiles.items()}
    return static_tiles(device) | found


@contextmanager
def override(product: str, candidate: Tile) -> Iterator[None]:
    """Use another tile for one product inside the block: for measuring, not for training."""
    _overrides[product] = candidate
    try:
        yield
    finally:
        del _overrides[product]


def offers(product: str, x: torch.Tensor) -> bool:
    """Whether a product has a tile for operands like `x`."""
    return interpreted() or x.dtype != torch.float32 or product in _FLOAT32


def block(size: int, most: int) -> int:
    """A power of two that covers `size`, at least 16 (the least side of a matrix product) and at most `most`."""
    return min(max(16, triton.next_power_of_2(size)), most)


def rows_for(n_slots: int, n_experts: int, most: int) -> int:
    """Fewer rows a tile where an expert has few: decoding reads weights, and should not multiply empty rows."""
    average = n_slots // max(1, min(n_experts, n_slots))
    return min(most, 16 if average <= 16 else 32 if average <= 32 else most)
