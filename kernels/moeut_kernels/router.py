"""Router-side ops: chosen experts and their gates from logits, and logits that are fast for any number of experts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from moeut_kernels.backend import resolve

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
    return _topk(logits, top_k, n_experts, "sigmoid")


def topk_softmax(logits: Tensor, top_k: int, n_experts: int | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` largest logits of each row and a softmax over those. Arguments and order as `topk_sigmoid`."""
    return _topk(logits, top_k, n_experts, "softmax")


def _topk(logits: Tensor, top_k: int, n_experts: int | None, score: str) -> tuple[Tensor, Tensor]:
    n_experts = logits.shape[-1] if n_experts is None else n_experts
    if not torch.jit.is_tracing() and not 1 <= top_k <= n_experts <= logits.shape[-1]:
        raise ValueError(
            f"top_k={top_k}, n_experts={n_experts} must satisfy 1 <= top_k <= n_experts <= {logits.shape[-1]} columns"
        )
    if resolve(logits) == "triton":
        return torch.ops.moeut.topk(logits, top_k, n_experts, score)
    chosen, index = logits[..., :n_experts].topk(top_k, dim=-1)
    chosen = chosen.float() if chosen.dtype in (torch.bfloat16, torch.float16) else chosen
    return index, torch.sigmoid(chosen) if score == "sigmoid" else torch.softmax(chosen, -1)


@torch.library.custom_op(
    "moeut::topk",
    mutates_args=(),
    schema="(Tensor logits, int top_k, int n_experts, str score) -> (Tensor, Tensor)",
)
def _fused_topk(logits: Tensor, top_k: int, n_experts: int, score: str) -> tuple[Tensor, Tensor]:
    from moeut_kernels import triton_routing

    rows = logits.reshape(-1, logits.shape[-1])
    index, gate = triton_routing.choose(rows, top_k, n_experts, score == "softmax")
    return index.view(*logits.shape[:-1], top_k), gate.view(*logits.shape[:-1], top_k)


@_fused_topk.register_fake
def _(logits: Tensor, top_k: int, n_experts: int, score: str) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "moeut::topk_backward",
    mutates_args=(),
    schema="(Tensor d_gate, Tensor index, Tensor gate, int width, ScalarType dtype, str score) -> Tensor",
)
def _fused_topk_backward(
    d_gate: Tensor, index: Tensor, gate: Tensor, width: int, dtype: torch.dtype, score: str
) -> Tensor:
    from moeut_kernels import triton_routing

    leading = d_gate.shape[:-1]
    d_gate, index, gate = (t.reshape(-1, t.shape[-1]) for t in (d_gate, index, gate))
    d_logits = triton_routing.choose_backward(d_gate, index, gate, width, dtype, score == "softmax")
    return d_logits.view(*leading, width)


@_fused_topk_backward.register_fake
def _(d_gate: Tensor, index: Tensor, gate: Tensor, width: int, dtype: torch.dtype, score: str) -> Tensor:
    return d_gate.new_empty((*d_gate.shape[:-1], width), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, ctx.score = inputs
    ctx.width, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, _: None, d_gate: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_gate is None:
        return None, None, None, None
    d_logits = torch.ops.moeut.topk_backward(d_gate, *ctx.saved_tensors, ctx.width, ctx.dtype, ctx.score)
    return d_logits, None, None, None


_fused_topk.register_autograd(_differentiate, setup_context=_setup_context)
