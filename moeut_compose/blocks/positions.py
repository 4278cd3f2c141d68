"""Position rules for attention: none, rotary, relative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeut_compose.blocks.cache import Start, positions
from moeut_compose.blocks.roles import Position


class NoPosition(Position):
    """Attention that knows order only through the causal mask."""

    def rotate(self, x: Tensor, start: Start) -> Tensor:
        return x

    def bias(self, query: Tensor, start: Start, n_keys: int) -> Tensor | None:
        return None


class Rope(Position):
    """Rotary embedding (arXiv:2104.09864) of the first `n_rotated` channels of each head, half-split.

    The angles are computed in float32 whatever the dtype of the model, as in the published code. Positions
    beyond the prepared table, and those of each sequence on its own, are computed when they occur.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, *, n_rotated: int, base: float, n_positions: int) -> None:
        super().__init__()
        self.n_rotated = n_rotated
        self.base = base
        self.register_buffer("cos", torch.empty(n_positions, n_rotated // 2), persistent=False)
        self.register_buffer("sin", torch.empty(n_positions, n_rotated // 2), persistent=False)

    def fill_tables(self) -> None:
        cos, sin = self.angles(positions(0, self.cos.shape[0], self.cos.device))
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., n_rotated / 2]` of positions `[...]`, in float32."""
        channels = torch.arange(0, self.n_rotated, 2, device=places.device, dtype=torch.float32)
        angles = places[..., None].float() * (1.0 / self.base ** (channels / self.n_rotated))
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor, start: Start) -> Tensor:
        if self.n_rotated == 0:
            return x
        length = x.shape[-3]
        if isinstance(start, int) and start + length <= self.cos.shape[0]:
            cos, sin = self.cos[start : start + length], self.sin[start : start + length]
        else:
            cos, sin = self.angles(positions(start, length, x.device))
        cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
        low, high, rest = x.split(
            (self.n_rotated // 2, self.n_rotated // 2, x.shape[-1] - self.n_rotated), dim=-1
        )
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

    def bias(self, query: Tensor, start: Start, n_keys: int) -> Tensor | None:
        return None


class Relative(Position):
    """Vectors for clipped distances, multiplied with the query (SUT, arXiv:2310.07096).

    The score of query i and key j gains q_i . table[:, clip(j - i, 1 - M, M - 1) + M] / d_head^(1/4), with M
    the maximal distance. The table is `[H, d_head, 2M + 1]`; query heads in excess of H (bundles of heads)
    share it in turn.
    """

    def __init__(self, *, n_heads: int, d_head: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.empty(n_heads, d_head, 2 * max_distance + 1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def rotate(self, x: Tensor, start: Start) -> Tensor:
        return x

    def bias(self, query: Tensor, start: Start, n_keys: int) -> Tensor | None:
        batch, _, length, d_head = query.shape
        n_heads = self.table.shape[0]
        bundles = query.reshape(batch, -1, n_heads, length, d_head) * d_head**-0.25
        by_distance = bundles @ self.table.to(query.dtype)
        rows = positions(start, length, query.device)
        columns = torch.arange(n_keys, device=query.device)
        reach = self.max_distance - 1
        distance = (columns - rows[..., None]).clamp(-reach, reach) + self.max_distance
        if not isinstance(start, int):
            distance = distance[:, None, None]
        scores = by_distance.gather(-1, distance.expand(*by_distance.shape[:-1], n_keys))
        return scores.reshape(batch, -1, length, n_keys)
