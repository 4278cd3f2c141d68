"""One token for each of a few sequences: the parts of a layer that read every weight they need once, and no other.

At a handful of tokens a layer takes as long as its weights take to arrive, or as its kernels take to start. So here
norm and residual are part of the product that follows, routing is part of the expert product, and sums over experts,
heads and slices of a matrix stay *pending*: a product returns addends `[P, N, D]` and whoever reads them next adds them
up, in a fixed order. There are no gradients. The definitions in this file are plain PyTorch and run everywhere; Triton
takes over on CUDA, and in its interpreter.

Legend: N tokens, D model width, H heads, F expert or head width, E experts (of a head), K choices, P addends, S room.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeut_kernels import activation as activations
from moeut_kernels.backend import TRITON_IS_INSTALLED, backend

MOST_TOKENS = 256
"""Beyond so many tokens the ops of training are the better choice."""

MOST_WIDTH = 256
"""Widest expert and head."""


class Norm(NamedTuple):
    """A normalisation over the last dimension, with weights `[D]` in float32."""

    kind: Literal["layer", "rms"]
    weight: Tensor
    bias: Tensor | None
    eps: float


class Normed(NamedTuple):
    """What `norm_project` returns."""

    total: Tensor
    """`[N, D]` float32: the residual stream with all addends."""
    data: Tensor
    """The same for products to read, perhaps in the dtype of the weights."""
    normed: Tensor
    """`[N, D]` its norm, for products to read."""
    product: Tensor
    """`[N, R]` float32."""


class Attended(NamedTuple):
    """Attention over slices of the memory, not yet put together."""

    sums: Tensor
    """`[Z, N, H, F]` float32: values, weighed with exp(score - top)."""
    tops: Tensor
    """`[Z, N, H]` the largest score of the slice; minus infinity for an empty one."""
    masses: Tensor
    """`[Z, N, H]` sum of the weights."""


def _wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _on_triton(x: Tensor) -> bool:
    requested = backend()
    if requested == "auto":
        return x.device.type == "cuda" and TRITON_IS_INSTALLED
    return requested == "triton"


def norm_project(
    x: Tensor, pending: Tensor | None, norm: Norm, weight: Tensor, bias: Tensor | None = None
) -> Normed:
    """Add what is pending to the residual stream, normalise, multiply: x [N, D], pending [P, N, D], weight [R, D].

    Sums, norm and scores are float32 whatever the dtype of the weight.
    """
    if _on_triton(x):
        from moeut_kernels import triton_decode

        return triton_decode.norm_project(x, pending, norm, weight, bias)
    total = _wide(x) if pending is None else _wide(x) + pending.sum(0)
    if norm.kind == "layer":
        normed = functional.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)
    else:
        normed = functional.rms_norm(total, total.shape[-1:], norm.weight, norm.eps)
    product = functional.linear(normed, _wide(weight), None if bias is None else _wide(bias))
    return Normed(total, total, normed, product)


def gate_matrix(logits: Tensor, top_k: int) -> Tensor:
    """Sigmoids of the `top_k` largest logits in each row `[..., E]`, zero elsewhere."""
    chosen, index = _wide(logits).topk(top_k, dim=-1)
    return chosen.new_zeros(logits.shape).scatter(-1, index, chosen.sigmoid())


def expert_values(x: Tensor, logits: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """Each head's gated sum over its chosen experts: x [N, D], logits [N, H, E], weight [H·E, D, F] -> [P, N, H, F]."""
    if _on_triton(x):
        from moeut_kernels import triton_decode_attention

        return triton_decode_attention.expert_values(x, logits, weight, top_k)
    heads = _wide(weight).unflatten(0, logits.shape[1:])
    gates = gate_matrix(logits, top_k)
    return torch.einsum("nd,nhe,hedf->nhf", _wide(x), gates, heads)[None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: tuple[Tensor, Tensor],
    position: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> Attended:
    """Attention of one new token of each sequence, whose key and value are written to the memory.

    query, key: [N, H, F], not yet rotated. value: addends [P, N, H, F]. memory: keys and values [N, H, S, F]. position:
    [N], where the new token stands; nothing behind it is seen. rope: cosines and sines [S, R / 2] for the first R
    channels, half-split; None for none. The scale is 1 / sqrt(F).
    """
    if _on_triton(query):
        from moeut_kernels import triton_decode_memory

        return triton_decode_memory.attend(query, key, value, memory, position, rope)
    keys, values = memory
    query, key = (rotated(_wide(part), position, rope) for part in (query, key))
    place = position[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
    keys.scatter_(2, place, key[:, :, None].to(keys.dtype))
    values.scatter_(2, place, value.sum(0)[:, :, None].to(values.dtype))
    scores = torch.einsum("nhf,nhsf->nhs", query, _wide(keys)) * query.shape[-1] ** -0.5
    seen = torch.arange(keys.shape[2], device=keys.device) <= position[:, None]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    tops = scores.amax(-1)
    weights = (scores - tops[..., None]).exp()
    sums = torch.einsum("nhs,nhsf->nhf", weights, _wide(values).masked_fill(~seen[:, None, :, None], 0))
    return Attended(sums[None], tops[None], weights.sum(-1)[None])


def rotated(x: Tensor, position: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary embedding of x [N, H, F], each token at its own position [N]."""
    if rope is None:
        return x
    cos, sin = (table[position][:, None] for table in rope)
    half = cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def merged(attended: Attended) -> Tensor:
    """The result of attention [N, H, F] from its slices."""
    weights = (attended.tops - attended.tops.amax(0)).exp()
    sums = (attended.sums * weights[..., None]).sum(0)
    return sums / (attended.masses * weights).sum(0)[..., None]


def expert_outputs(attended: Attended, logits: Tensor | None, weight: Tensor, top_k: int) -> Tensor:
    """Output projection: logits [N, H, E], weight [H·E, F, D] -> addends [P, N, D].

    Without logits every head has one matrix and no gate: weight [H, F, D].
    """
    if _on_triton(attended.sums):
        from moeut_kernels import triton_decode_attention

        return triton_decode_attention.expert_outputs(attended, logits, weight, top_k)
    mixed = merged(attended)
    if logits is None:
        return torch.einsum("nhf,hfd->nd", mixed, _wide(weight))[None]
    heads = _wide(weight).unflatten(0, logits.shape[1:])
    return torch.einsum("nhf,nhe,hefd->nd", mixed, gate_matrix(logits, top_k), heads)[None]


def expert_feedforward(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, top_k: int, activation: str = "relu"
) -> Tensor:
    """Sigma-MoE: x [N, D], logits [N, E], up [E, D, F] (2F for gated activations), down [E, F, D] -> [P, N, D]."""
    if _on_triton(x):
        from moeut_kernels import triton_decode_feedforward

        return triton_decode_feedforward.expert_feedforward(x, logits, up, down, top_k, activation)
    gates = gate_matrix(logits, top_k)
    hidden = activations.apply(activation, torch.einsum("nd,edf->nef", _wide(x), _wide(up)))
    return torch.einsum("nef,ne,efd->nd", hidden, gates, _wide(down))[None]
