"""Router-side ops: the chosen experts and their gates from logits, and logits whose product is fast at any expert count."""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from moeut_kernels.backend import resolve

ALIGNMENT = 8
"""Columns of logits are padded to a multiple of this on CUDA: cuBLAS is 5 to 8 times slower on an odd number of columns."""


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
    """The `top_k` largest logits of each row and a softmax over those, in descending order. Arguments as `topk_sigmoid`."""
    return _topk(logits, top_k, n_experts, "softmax")


def _topk(logits: Tensor, top_k: int, n_experts: int | None, score: str) -> tuple[Tensor, Tensor]:
    if not torch.jit.is_tracing():
        width = logits.shape[-1]
        n_experts = width if n_experts is None else n_experts
        if not 1 <= top_k <= n_experts <= width:
            raise ValueError(
                f"top_k={top_k}, n_experts={n_experts} must satisfy 1 <= top_k <= n_experts <= {width} columns"
            )
    if resolve(logits) == "triton" and logits.device.type != "meta":
        index, gate = torch.ops.moeut.topk(logits, top_k, n_experts, score)
        return index, gate
    chosen, index = logits[..., :n_experts].topk(top_k, dim=-1)
    chosen = chosen.float() if chosen.dtype in (torch.bfloat16, torch.float16) else chosen
    return index, torch.sigmoid(chosen) if score == "sigmoid" else torch.softmax(chosen, -1)
