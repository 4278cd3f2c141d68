"""Expert projections around a mixer: `expert_split` into groups (SwitchHead values), `expert_merge` back (outputs).

Both are one grouped product. They differ in how many slots read one input row and how many add up in one output row:
split reads a token H·K times and adds K slots; merge reads a (token, group) row K times and adds H·K slots.
Legend: N tokens, H groups, K choices, S = N·H·K slots, E experts, D columns in, F columns out. Source: SwitchHead,
arXiv:2312.07987, equations 7 to 10.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeut_kernels import reference
from moeut_kernels.backend import resolve
from moeut_kernels.casting import compute_dtype, copy_for
from moeut_kernels.plan import Plan

_ROUTING = "Tensor index, Tensor slots, Tensor position, Tensor offsets, Tensor tiles"
_FORWARD = f"(Tensor x, Tensor weight, Tensor? cast, Tensor? gate, Tensor? bias, {_ROUTING}, bool save, str backend) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad, Tensor x, Tensor weight, Tensor? cast, Tensor? gate, Tensor? bias, Tensor product, {_ROUTING}, bool[] wants, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def expert_split(
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cast: Tensor | None = None,
) -> Tensor:
    """Project every token into each of its groups by the group's chosen experts.

        out[n, h] = sum_k gate[n, h, k] · (x[n] @ weight[e] + bias[e]),  e = plan.index[n, h, k]

    x: [N, D]. weight: [E, D, F]. gate: [N, H, K], None for ones. bias: [E, F]. Returns [N, H, F] in the dtype of x.
    cast: a copy of a float32 `weight` in the compute dtype, see `cast_weights`. Raises `ValueError` for shapes that do
    not fit the plan.
    """
    return _project(torch.ops.moeut.expert_split, x, weight, plan, gate, bias, cast, rank=2)


def expert_merge(
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cast: Tensor | None = None,
) -> Tensor:
    """Project the groups of every token by their chosen experts and add them up.

        out[n] = sum_h sum_k gate[n, h, k] · (x[n, h] @ weight[e] + bias[e]),  e = plan.index[n, h, k]

    x: [N, H, D]. weight: [E, D, F]. gate: [N, H, K], None for ones. bias: [E, F]. Returns [N, F] in the dtype of x.
    cast: as in `expert_split`. Raises `ValueError` for shapes that do not fit the plan.
    """
    return _project(torch.ops.moeut.expert_merge, x, weight, plan, gate, bias, cast, rank=3)


def _project(
    op,
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None,
    bias: Tensor | None,
    cast: Tensor | None,
    rank: int,
) -> Tensor:
    if not torch.jit.is_tracing():
        _check(x, weight, plan, gate, bias, rank)
    x = x.to(compute_dtype(x))
    cast = copy_for(weight, cast, x.dtype, "cast")
    save = torch.is_grad_enabled() and gate is not None and gate.requires_grad
    return op(x, weight, cast, gate, bias, *plan.tensors, save, resolve(x))[0]


def _check(
    x: Tensor, weight: Tensor, plan: Plan, gate: Tensor | None, bias: Tensor | None, rank: int
) -> None:
    index = plan.index
    if weight.dim() != 3 or weight.shape[0] != plan.n_experts:
        raise ValueError(f"weight must be [E, D, F] with E={plan.n_experts}, got {tuple(weight.shape)}")
    expected = (*index.shape[: rank - 1], weight.shape[1])
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"x must be {tuple(expected)} for this plan and weight, got {tuple(x.shape)}")
    if gate is not None and gate.shape != index.shape:
        raise ValueError(f"gate must be {tuple(index.shape)} like the plan's index, got {tuple(gate.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"bias must be {(weight.shape[0], weight.shape[2])}, got {tuple(bias.shape)}")


def _forward(merge: bool, x, weight, cast, gate, bias, index, slots, position, offsets, tiles, save, backend):
    """Body of both forwards: the output, and the ungated products in expert order if the gate needs its gradient later."""
    matrix = weight if cast is None else cast
    if backend == "triton":
        from moeut_kernels import triton_projection

        return triton_projection.forward(
            merge, x, matrix, gate, bias, index, slots, position, offsets, tiles, save
        )
    n_tokens, n_groups, top_k = index.shape
    per_input, per_output = (top_k, n_groups * top_k) if merge else (n_groups * top_k, top_k)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, slots // per_input)
    product = reference.grouped_rows(rows, matrix.contiguous(), offsets, backend)
    if bias is not None:
        product = product + bias.to(product.dtype).index_select(
            0, index.reshape(-1).index_select(0, slots).int()
        )
    out = reference.gather_sum(
        product, position.view(-1, per_output), None if gate is None else gate.reshape(-1, per_output)
    )
    saved = product if save and not merge else product.new_empty(0)
    return out if merge else out.view(n_tokens, n_groups, weight.shape[2]), saved


def _backward(
    merge: bool,
    grad,
    x,
    weight,
    cast,
    gate,
    bias,
    product,
    index,
    slots,
    position,
    offsets,
    tiles,
    wants,
    backend,
):
    """Body of both backwards: gradients of x, weight, gate, bias; empty where not wanted."""
    matrix = weight if cast is None else cast
    if backend == "triton":
        from moeut_kernels import triton_projection

        return triton_projection.backward(
            merge,
            grad,
            x,
            matrix,
            weight.dtype,
            gate,
            bias,
            product,
            index,
            slots,
            position,
            offsets,
            tiles,
            wants,
        )
    _, n_groups, top_k = index.shape
    per_input, per_output = (top_k, n_groups * top_k) if merge else (n_groups * top_k, top_k)
    want_x, want_weight, want_gate, want_bias = wants
    d_x, d_weight, d_gate, d_bias = (grad.new_empty(0) for _ in wants)
    flat = grad.reshape(-1, grad.shape[-1])
    d_rows = flat.index_select(0, slots // per_output)
    ordered = None if gate is None else gate.reshape(-1).index_select(0, slots).to(d_rows.dtype).unsqueeze(1)
    if want_x or (want_gate and merge):
        back = reference.grouped_rows(d_rows, matrix.transpose(1, 2), offsets, backend)
        if want_x:
            gates = None if gate is None else gate.reshape(-1, per_input)
            d_x = reference.gather_sum(back, position.view(-1, per_input), gates).view(x.shape)
    if want_weight or (want_gate and merge):
        rows = x.reshape(-1, x.shape[-1]).index_select(0, slots // per_input)
        if want_weight:
            left, right = (
                (rows, d_rows)
                if ordered is None
                else (rows * ordered, d_rows)
                if merge
                else (rows, d_rows * ordered)
            )
            d_weight = reference.grouped_outer(left, right, offsets, backend).to(weight.dtype)
    if want_gate:
        dots = (rows * back).sum(1) if merge else (product * d_rows).sum(1)
        d_gate = dots.index_select(0, position).view(gate.shape).to(gate.dtype)
        if merge and bias is not None:
            scores = flat @ bias.to(flat.dtype).t()
            d_gate = d_gate + scores.gather(1, index.reshape(-1, per_output).long()).view(gate.shape).to(
                gate.dtype
            )
    if want_bias:
        gates = torch.ones_like(index, dtype=flat.dtype) if gate is None else gate.to(flat.dtype)
        dense = reference.gate_matrix(
            gates.reshape(-1, per_output), index.reshape(-1, per_output), weight.shape[0]
        )
        d_bias = (dense.t() @ flat).to(bias.dtype)
    return d_x, d_weight, d_gate, d_bias


def _register(name: str, merge: bool) -> None:
    """One forward and one backward op with fake, autograd and FLOP formulas."""

    def forward(*arguments):
        return _forward(merge, *arguments)

    def backward(*arguments):
        return _backward(merge, *arguments)

    def fake_forward(x, weight, cast, gate, bias, index, slots, position, offsets, tiles, save, backend):
        width = weight.shape[2]
        out = (
            x.new_empty(index.shape[0], width)
            if merge
            else x.new_empty(index.shape[0], index.shape[1], width)
        )
        return out, x.new_empty(slots.shape[0], width) if save and not merge else x.new_empty(0)

    def fake_backward(
        grad, x, weight, cast, gate, bias, product, index, slots, position, offsets, tiles, wants, backend
    ):
        sources = (x, weight, gate, bias)
        return tuple(
            torch.empty(source.shape, dtype=source.dtype, device=source.device)
            if wanted
            else grad.new_empty(0)
            for source, wanted in zip(sources, wants, strict=True)
        )

    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, grad, _):
        if grad is None:
            return (None,) * 12
        *tensors, product = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wants = [needs[0], needs[1], needs[3], needs[4]]
        grads = backward_packet(grad, *tensors[:5], product, *tensors[5:], wants, ctx.backend)
        d_x, d_weight, d_gate, d_bias = (
            g if wanted else None for g, wanted in zip(grads, wants, strict=True)
        )
        return d_x, d_weight, None, d_gate, d_bias, *(None,) * 7

    forward_op = torch.library.custom_op(f"moeut::{name}", forward, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(
        f"moeut::{name}_backward", backward, mutates_args=(), schema=_BACKWARD
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(differentiate, setup_context=setup_context)
    backward_packet = getattr(torch.ops.moeut, f"{name}_backward")

    @register_flop_formula(getattr(torch.ops.moeut, name))
    def _(x, weight, cast, gate, bias, index, *_, **__) -> int:
        return 2 * math.prod(index) * weight[1] * weight[2]

    @register_flop_formula(backward_packet)
    def _(
        grad, x, weight, cast, gate, bias, product, index, slots, position, offsets, tiles, wants, *_, **__
    ) -> int:
        n_products = int(wants[0] or (merge and wants[2])) + int(wants[1])
        return n_products * 2 * math.prod(index) * weight[1] * weight[2]


_register("expert_split", merge=False)
_register("expert_merge", merge=True)
