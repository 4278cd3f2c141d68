"""Causal attention over queries, keys and values that are already projected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moeut_compose.blocks.cache import Memory, Start, positions
from moeut_compose.blocks.roles import Position


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """`[B, T, H * d_head]` to `[B, H, T, d_head]`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def rotated_heads(x: Tensor, n_heads: int, *, position: Position, start: Start) -> Tensor:
    """Queries or keys `[B, T, H * d_head]` to `[B, H, T, d_head]`, rotated.

    Rotation comes first: what it writes then lies token by token, as values and results of attention do, and no
    attention kernel has to have anything copied.
    """
    return position.rotate(x.unflatten(-1, (n_heads, -1)), start).transpose(1, 2)


def remember(key: Tensor, value: Tensor, past: Memory | None, start: Start) -> Memory:
    """Add keys and values `[B, H, T, d_head]` to the memory of earlier positions: behind it, or into its room."""
    if past is None:
        return key, value
    if not isinstance(start, int):
        place = positions(start, key.shape[-2], key.device)[:, None, :, None].expand_as(key)
        for memory, new in zip(past, (key, value), strict=True):
            memory.scatter_(2, place, new.to(memory.dtype))
        return past
    return torch.cat((past[0], key), dim=-2), torch.cat((past[1], value), dim=-2)


def attend(query: Tensor, memory: Memory, *, position: Position, start: Start) -> Tensor:
    """Softmax attention, scale 1/sqrt(d_head).

    `query [B, H, T, d_head]` stands at positions `start, start + 1, ...` and sees everything up to itself in
    `memory`. A memory with room is seen up to the query as well.
    """
    key, value = memory
    length, n_keys = query.shape[-2], key.shape[-2]
    bias = position.bias(query, start, n_keys)
    alike = isinstance(start, int)
    if bias is None and alike and length == n_keys:
        return _attend_causally(query, key, value)
    if bias is None and alike and length == 1:
        return F.scaled_dot_product_attention(query, key, value)
    rows = positions(start, length, query.device)
    visible = torch.arange(n_keys, device=query.device) <= rows[..., None]
    visible = visible if alike else visible[:, None]
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~visible, float("-inf"))
    )


def _attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of a whole sequence to itself; odd heads get zero channels, as fast 16-bit kernels want them."""
    width = query.shape[-1]
    missing = -width % 8 if query.dtype.itemsize == 2 else 0
    if not missing:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    query, key, value = (F.pad(part, (0, missing)) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=width**-0.5)
    return mixed[..., :width]
