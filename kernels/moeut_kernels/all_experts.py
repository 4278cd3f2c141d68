"""Expert projections in which every expert multiplies every row, and gates of zero drop what was not chosen.

Where a token chooses half of the experts, as in SwitchHead with two of four for every head, this takes twice the
arithmetic in a few large products, and no row is gathered or scattered: on a CPU the faster way. What is not finite in
an expert spreads to tokens that did not choose it: nought times it is NaN.
Legend: N tokens, H groups, K choices, E experts, D columns in, F columns out; G [N, H, E] the gates, else zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeut_kernels import reference

MOST_PER_CHOICE = 2
"""Experts for each choice of a token up to which this pays."""


def suits(index: Tensor, n_experts: int) -> bool:
    """Whether tokens with this choice [N, H, K] use enough of the experts."""
    return n_experts <= MOST_PER_CHOICE * index.shape[1] * index.shape[2]


@torch.autocast("cpu", enabled=False)
def forward(
    merge: bool, x: Tensor, weight: Tensor, gate: Tensor | None, bias: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The output of `expert_merge` or `expert_split`, and of a split the products of all experts [N, E, F].

    Arguments as there, the choice without a plan.
    """
    gates = _gates(gate, index, weight.shape[0], x.dtype)
    if merge:
        out = _for_each(gates, x).flatten(1) @ weight.flatten(0, 1)
        return out if bias is None else out + gates.sum(1) @ bias.to(out.dtype), x.new_empty(0)
    products = _products(x, weight)
    out = gates @ products
    return out if bias is None else out + gates @ bias.to(out.dtype), products


@torch.autocast("cpu", enabled=False)
def backward(
    merge: bool,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    products: Tensor,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate and bias; empty where not wanted. products: of `forward`, grad: of its output."""
    want_x, want_weight, want_gate, want_bias = wants
    d_x, d_weight, d_gate, d_bias = (grad.new_empty(0) for _ in wants)
    gates = _gates(gate, index, weight.shape[0], grad.dtype)
    n_experts, depth, width = weight.shape
    if merge:
        back = _products(grad, weight.transpose(1, 2)) if want_x or want_gate else None
        d_x = gates @ back if want_x else d_x
        scores = x @ back.transpose(1, 2) if want_gate else None
        if want_weight:
            d_weight = (_for_each(gates, x).flatten(1).t() @ grad).view(weight.shape)
    else:
        back = _for_each(gates, grad).flatten(1) if want_x or want_weight else None
        d_x = back @ weight.transpose(1, 2).flatten(0, 1) if want_x else d_x
        scores = grad @ products.transpose(1, 2) if want_gate else None
        if want_weight:
            d_weight = (x.t() @ back).view(depth, n_experts, width).transpose(0, 1).contiguous()
    if want_gate:
        if bias is not None:
            of_bias = grad @ bias.to(grad.dtype).t()
            scores = scores + (of_bias.unsqueeze(1) if merge else of_bias)
        d_gate = scores.gather(2, index.long()).to(gate.dtype)
    if want_bias:
        of_output = gates.sum(1) if merge else gates.flatten(0, 1)
        d_bias = (of_output.t() @ grad.reshape(-1, grad.shape[-1])).to(bias.dtype)
    return d_x, d_weight, d_gate, d_bias


def _gates(gate: Tensor | None, index: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    """The gate of every expert for every group, [N, H, E]; an expert that was chosen twice has both."""
    gate = torch.ones_like(index, dtype=dtype) if gate is None else gate.to(dtype)
    return reference.gate_matrix(gate.flatten(0, 1), index.flatten(0, 1), n_experts).view(
        *index.shape[:2], n_experts
    )


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """Each row times each matrix: x [N, D], weight [E, D, F] -> [N, E, F]."""
    n_experts, depth, width = weight.shape
    return (x @ weight.transpose(0, 1).reshape(depth, -1)).view(-1, n_experts, width)


def _for_each(gates: Tensor, rows: Tensor) -> Tensor:
    """For each expert the gated sum of a token's groups: gates [N, H, E], rows [N, H, D] -> [N, E, D]."""
    return gates.transpose(1, 2) @ rows
