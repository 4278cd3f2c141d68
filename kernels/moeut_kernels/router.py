"""Router-side ops: chosen experts, their gates and mean use from logits, and logits that are fast for any number."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from moeut_kernels.backend import resolve
from moeut_kernels.casting import wide_float

ALIGNMENT = 8
"""Logits are padded to a multiple of this many columns on CUDA: cuBLAS is several times slower on an odd number."""


def padded_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Router logits x @ weight.T with the expert dimension padded by zero columns to a multiple of 8 on CUDA.

    x: [..., D]. weight: [E, D]. Returns [..., E'] with E' >= E; hand `n_experts=E` to `topk_sigmoid` or slice.
    """
    missing = -weight.shape[0] % ALIGNMENT if x.device.type == "cuda" else 0
    return linear(x, pad(weight, (0, 0, 0, missing)) if missing else weight)


def topk_sigmoid(logits: Tensor, top_k: int, n_experts: int | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` largest logits of each row and their sigmoids, in descending order.

    logits: [..., E']; only the first `n_experts` columns take part (default all). Returns (index int64 [..., K], gate
    [..., K]). gate is float32 for half-precision logits, else of the dtype of the logits, and differentiable.
    Raises `ValueError` unless 1 <= top_k <= n_experts <= E'.
    """
    return _topk(logits, top_k, n_experts, "sigmoid", usage=False)[:2]


def topk_softmax(logits: Tensor, top_k: int, n_experts: int | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` largest logits of each row and a softmax over those. Arguments and order as `topk_sigmoid`."""
    return _topk(logits, top_k, n_experts, "softmax", usage=False)[:2]


def topk_sigmoid_usage(
    logits: Tensor, top_k: int, n_experts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_sigmoid` of logits [B, T, H, E'], and how much each expert would be used by a softmax.

    The third result, [B, H, E] in the dtype of the gates, is the softmax over the first `n_experts` columns, summed
    over T: what balance terms are made of (arXiv:2405.16039, section 2.2). Differentiable. On Triton logits are read
    where they lie and their gradient is written once. Raises `ValueError` as `topk_sigmoid`, and for another rank.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits must be [B, T, H, E], got shape {tuple(logits.shape)}")
    return _topk(logits, top_k, n_experts, "sigmoid", usage=True)


def _topk(
    logits: Tensor, top_k: int, n_experts: int | None, score: str, *, usage: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n_experts = logits.shape[-1] if n_experts is None else n_experts
    if not torch.jit.is_tracing() and not 1 <= top_k <= n_experts <= logits.shape[-1]:
        raise ValueError(
            f"top_k={top_k}, n_experts={n_experts} must satisfy 1 <= top_k <= n_experts <= {logits.shape[-1]} columns"
        )
    if resolve(logits) == "triton":
        return torch.ops.moeut.topk(logits, top_k, n_experts, score, usage)
    logits = logits[..., :n_experts]
    chosen, index = logits.topk(top_k, dim=-1)
    chosen = wide_float(chosen)
    gate = torch.sigmoid(chosen) if score == "sigmoid" else torch.softmax(chosen, -1)
    return index, gate, wide_float(logits).softmax(-1).sum(1) if usage else gate.new_empty(0)


def _by_token(logits: Tensor) -> Tensor:
    """[N, H, E'] of [..., H, E'], copied only where tokens are not evenly spaced or columns lie apart."""
    if logits.dim() <= 2:
        logits = logits.reshape(-1, 1, logits.shape[-1])
    *leading, n_heads, width = logits.shape
    spaced = all(logits.stride(i) == logits.stride(i + 1) * leading[i + 1] for i in range(len(leading) - 1))
    logits = logits if spaced and logits.stride(-1) == 1 else logits.contiguous()
    return logits.view(math.prod(leading), n_heads, width)


@torch.library.custom_op(
    "moeut::topk",
    mutates_args=(),
    schema="(Tensor logits, int top_k, int n_experts, str score, bool usage) -> (Tensor, Tensor, Tensor)",
)
def _fused_topk(
    logits: Tensor, top_k: int, n_experts: int, score: str, usage: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from moeut_kernels import triton_router

    rows, shape = _by_token(logits), (*logits.shape[:-1], top_k)
    index, gate = triton_router.choose(rows, top_k, n_experts, score == "softmax")
    used = triton_router.usage(rows, logits.shape[0], n_experts) if usage else gate.new_empty(0)
    return index.view(shape), gate.view(shape), used


@_fused_topk.register_fake
def _(logits: Tensor, top_k: int, n_experts: int, score: str, usage: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    used = (logits.shape[0], logits.shape[2], n_experts) if usage else (0,)
    index, gate = logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)
    return index, gate, logits.new_empty(used, dtype=torch.float32)


@torch.library.custom_op(
    "moeut::topk_backward",
    mutates_args=(),
    schema="(Tensor? d_gate, Tensor? d_usage, Tensor? logits, Tensor index, Tensor gate, int width, ScalarType dtype,"
    " str score) -> Tensor",
)
def _fused_topk_backward(
    d_gate: Tensor | None,
    d_usage: Tensor | None,
    logits: Tensor | None,
    index: Tensor,
    gate: Tensor,
    width: int,
    dtype: torch.dtype,
    score: str,
) -> Tensor:
    from moeut_kernels import triton_router

    d_gate, index_rows, gate_rows = (None if t is None else _by_token(t) for t in (d_gate, index, gate))
    d_logits = triton_router.choose_backward(
        d_gate, d_usage, None if logits is None else _by_token(logits), index_rows, gate_rows, width, dtype,
        score == "softmax",
    )  # fmt: skip
    return d_logits.view(*index.shape[:-1], width)


@_fused_topk_backward.register_fake
def _(d_gate, d_usage, logits, index, gate, width, dtype, score):  # type: ignore[no-untyped-def]
    return gate.new_empty((*gate.shape[:-1], width), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, ctx.score, usage = inputs
    ctx.width, ctx.dtype, ctx.usage = logits.shape[-1], logits.dtype, usage
    ctx.save_for_backward(*output[:2], *((logits,) if usage else ()))
    ctx.mark_non_differentiable(output[0], *(() if usage else (output[2],)))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, _: None, d_gate: Tensor | None, d_usage: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_gate is None and d_usage is None:
        return (None,) * 5
    index, gate, *kept = ctx.saved_tensors
    logits = kept[0] if d_usage is not None else None
    d_logits = torch.ops.moeut.topk_backward(
        d_gate, d_usage, logits, index, gate, ctx.width, ctx.dtype, ctx.score
    )
    return d_logits, *(None,) * 4


_fused_topk.register_autograd(_differentiate, setup_context=_setup_context)
