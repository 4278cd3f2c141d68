"""Expert projections around a mixer: `expert_split` into groups (SwitchHead values), `expert_merge` back (outputs).

Both are one grouped product. They differ in how many slots read one input row and how many add up in one output row:
split reads a token H·K times and adds K slots; merge reads a (token, group) row K times and adds H·K slots.
Legend: N tokens, H groups, K choices, S = N·H·K slots, E experts, D columns in, F columns out.
Source: SwitchHead, arXiv:2312.07987.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeut_kernels import all_experts, reference
from moeut_kernels.backend import resolve
from moeut_kernels.casting import compute_dtype, copy_for, of_master, widen
from moeut_kernels.deferral import Ticket, as_message, defer
from moeut_kernels.layout import lay_out
from moeut_kernels.norm import Shares, ShareShape
from moeut_kernels.plan import Plan, slots_per_row

_OPERANDS = "Tensor x, Tensor weight, Tensor? cast, Tensor? gate, Tensor? bias"
_ROUTING = (
    "Tensor index, Tensor slots, Tensor position, Tensor offsets, Tensor tiles, Tensor low_slots, "
    "Tensor pair_tiles"
)
_FORWARD = (
    f"({_OPERANDS}, {_ROUTING}, bool save, bool summed, str backend, Tensor[] tickets, Tensor[] shares)"
    " -> (Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor grad, {_OPERANDS}, {_ROUTING}, Tensor kept, bool[] wants, bool hand_in, bool sum_x, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def expert_split(
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cast: Tensor | None = None,
    ticket: Ticket | None = None,
    shares: Shares | None = None,
) -> Tensor:
    """Project every token into each of its groups by the group's chosen experts.

        out[n, h] = sum_k gate[n, h, k] · (x[n] @ weight[e] + bias[e]),  e = plan.index[n, h, k]

    x: [N, D]. weight: [E, D, F]. gate: [N, H, K], None for ones. bias: [E, F]. Returns [N, H, F] in the dtype of x.
    cast: a copy of a float32 `weight` in the compute dtype, see `cast_weights`. ticket: of this use, see
    `projection_tickets`. shares: of the `norm_fan` that made x, which then gets the gradient of x in unsummed rows, see
    `split_shares`. Raises `ValueError` for shapes that do not fit the plan.
    """
    return _project("expert_split", x, weight, plan, gate, bias, cast, ticket, shares=shares)


def expert_merge(
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cast: Tensor | None = None,
    ticket: Ticket | None = None,
    summed: bool = True,
) -> Tensor:
    """Project the groups of every token by their chosen experts and add them up.

        out[n] = sum_h sum_k gate[n, h, k] · (x[n, h] @ weight[e] + bias[e]),  e = plan.index[n, h, k]

    x: [N, H, D]. weight: [E, D, F]. gate: [N, H, K], None for ones. bias: [E, F]. Returns [N, F] in the dtype of x.
    cast, ticket: as in `expert_split`. summed: without, the groups' parts [N, H, F] for a `norm_fan` to add up, and
    nothing else: the backward takes the gradient of one for that of all. Raises `ValueError` for shapes that do not fit
    the plan.
    """
    return _project("expert_merge", x, weight, plan, gate, bias, cast, ticket, summed=summed)


def _project(
    name: str,
    x: Tensor,
    weight: Tensor,
    plan: Plan,
    gate: Tensor | None,
    bias: Tensor | None,
    cast: Tensor | None,
    ticket: Ticket | None,
    *,
    summed: bool = True,
    shares: Shares | None = None,
) -> Tensor:
    if not torch.jit.is_tracing():
        _check(x, weight, plan, gate, bias, n_leading=1 if name == "expert_split" else 2)
    x = x.to(compute_dtype(x))
    cast = copy_for(weight, cast, x.dtype, "cast")
    width = weight.shape[2]
    x = widen(x, weight.shape[1] if cast is None else cast.shape[1])
    if ticket is not None:
        weight, cast = (weight if cast is None else cast).detach(), None
    save = torch.is_grad_enabled() and gate is not None and gate.requires_grad
    op = torch.ops.moeut.expert_split if name == "expert_split" else torch.ops.moeut.expert_merge
    backend = resolve(x, (plan.index.numel() // plan.n_experts, weight.shape[1] * weight.shape[2]))
    whole = ticket is None and shares is None and summed
    if backend == "bmm" and whole and all_experts.suits(plan.index, plan.n_experts):
        backend = "all_experts"
    out = op(
        x, weight, cast, gate, bias, *plan.tensors, *plan.pairs, save, summed, backend, list(ticket or ()),
        list(shares or ()),
    )[0]  # fmt: skip
    return out if torch.jit.is_tracing() or out.shape[-1] == width else out[..., :width]


def projection_tickets(
    weight: Tensor, n_uses: int, *, merge: bool, cast: Tensor, n_tokens: int, n_groups: int, top_k: int
) -> list[Ticket]:
    """Tickets of `n_uses` calls of `expert_merge` or `expert_split` with this weight and cast on `n_tokens` tokens."""
    n_slots, (_, depth, width) = n_tokens * n_groups * top_k, cast.shape
    ordered, gathered = (n_slots, depth if merge else width), (n_tokens, width if merge else depth)
    left, right = (ordered, gathered) if merge else (gathered, ordered)
    per_token = n_groups * top_k
    return defer(
        weight, n_uses, left=left, right=right, dtype=cast.dtype, n_slots=n_slots,
        per_left=None if merge else per_token, per_right=per_token if merge else None,
    )  # fmt: skip


def split_shares(x: Tensor, weight: Tensor, n_groups: int) -> ShareShape:
    """What `expert_split` hands back of the gradient of x [..., D]; weight: the one it multiplies by, or a copy."""
    return ShareShape(x.shape[:-1].numel() * n_groups, weight.shape[1], listed=False)


def _check(
    x: Tensor, weight: Tensor, plan: Plan, gate: Tensor | None, bias: Tensor | None, n_leading: int
) -> None:
    index = plan.index
    if weight.dim() != 3 or weight.shape[0] != plan.n_experts:
        raise ValueError(f"weight must be [E, D, F] with E={plan.n_experts}, got {tuple(weight.shape)}")
    expected = (*index.shape[:n_leading], weight.shape[1])
    if tuple(x.shape) != expected:
        raise ValueError(f"x must be {expected} for this plan and weight, got {tuple(x.shape)}")
    if gate is not None and gate.shape != index.shape:
        raise ValueError(f"gate must be {tuple(index.shape)} like the plan's index, got {tuple(gate.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"bias must be {(weight.shape[0], weight.shape[2])}, got {tuple(bias.shape)}")


def _forward(
    merge: bool,
    x: Tensor,
    weight: Tensor,
    cast: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    routing: Sequence[Tensor],
    save: bool,
    summed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and what the gate gradient of a split needs: the ungated products. Body of both forwards."""
    matrix = weight if cast is None else cast
    if backend == "triton":
        from moeut_kernels import triton_projection

        return triton_projection.forward(merge, x, matrix, gate, bias, routing, save, summed)
    index, slots, position, offsets, *_ = routing
    if backend == "all_experts":
        out, products = all_experts.forward(merge, x, matrix, gate, bias, index)
        return out, products if save and not merge else x.new_empty(0)
    layout = lay_out(slots, position, offsets, backend)
    per_input, per_output = slots_per_row(merge, index, apart=not summed)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, layout.slots // per_input)
    products = layout.multiply(rows, matrix.contiguous())
    if bias is not None:
        expert = index.reshape(-1).index_select(0, layout.slots).int()
        products += bias.to(products.dtype).index_select(0, expert)
    gates = None if gate is None else gate.reshape(-1, per_output)
    out = reference.gather_sum(products, layout.position.view(-1, per_output), gates)
    kept = layout.packed(products) if save and not merge else products.new_empty(0)
    return out if merge and summed else out.view(index.shape[0], index.shape[1], matrix.shape[2]), kept


def _backward(
    merge: bool,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cast: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    routing: Sequence[Tensor],
    kept: Tensor,
    wants: Sequence[bool],
    hand_in: bool,
    sum_x: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, gate, bias, and what is handed in; empty where not wanted. Body of both backwards.

    Unless sum_x, that of a split's x comes by group, [N · H, D]. Handed in: gate times the output gradient (split) or
    the input (merge) in expert order.
    """
    matrix = weight if cast is None else cast
    if backend == "triton":
        from moeut_kernels import triton_projection

        return triton_projection.backward(
            merge, grad, x, matrix, weight, gate, bias, routing, kept, wants, hand_in, sum_x
        )
    index, slots, position, offsets, *_ = routing
    if backend == "all_experts":
        d_x, d_weight, d_gate, d_bias = all_experts.backward(
            merge, grad, x, matrix, gate, bias, index, kept, wants
        )
        if wants[1]:
            d_weight = of_master(d_weight, weight)
        return d_x, d_weight, d_gate, d_bias, grad.new_empty(0)
    layout = lay_out(slots, position, offsets, backend)
    per_input, per_output = slots_per_row(merge, index)
    want_x, want_weight, want_gate, want_bias = wants
    d_x, d_weight, d_gate, d_bias = (grad.new_empty(0) for _ in wants)
    flat = grad.reshape(-1, grad.shape[-1])
    d_rows = flat.index_select(0, layout.slots // per_output)
    needs_back = want_x or (want_gate and merge)
    needs_rows = want_weight or hand_in or (want_gate and merge)
    if needs_back:
        back = layout.multiply(d_rows, matrix.transpose(1, 2))
    if needs_rows:
        rows = x.reshape(-1, x.shape[-1]).index_select(0, layout.slots // per_input)
    if want_x:
        terms, _ = slots_per_row(merge, index, apart=not sum_x)
        gates = None if gate is None else gate.reshape(-1, terms)
        d_x = reference.gather_sum(back, layout.position.view(-1, terms), gates)
        d_x = d_x.view(x.shape) if sum_x else d_x
    if want_gate:
        dots = (rows * back if merge else layout.spread(kept) * d_rows).sum(1)
        dots = dots.index_select(0, layout.position).view(gate.shape)
        if merge and bias is not None:
            scores = flat @ bias.to(flat.dtype).t()
            dots += scores.gather(1, index.reshape(-1, per_output).long()).view(gate.shape)
        d_gate = dots.to(gate.dtype)
    gate_rows = layout.gates(gate) if want_weight or hand_in else None
    if gate_rows is not None:
        (rows if merge else d_rows).mul_(gate_rows)
    if want_weight:
        d_weight = of_master(layout.outer(rows, d_rows), weight)
    if want_bias:
        gates = torch.ones_like(index, dtype=flat.dtype) if gate is None else gate.to(flat.dtype)
        dense = reference.gate_matrix(
            gates.reshape(-1, per_output), index.reshape(-1, per_output), weight.shape[0]
        )
        d_bias = (dense.t() @ flat).to(bias.dtype)
    ordered = layout.packed(rows if merge else d_rows) if hand_in else grad.new_empty(0)
    return d_x, d_weight, d_gate, d_bias, ordered


def _register(name: str, merge: bool) -> None:
    """One forward and one backward op with fake, autograd and FLOP formulas."""

    def forward(x, weight, cast, gate, bias, *rest):
        *routing, save, summed, backend, _, _ = rest
        return _forward(merge, x, weight, cast, gate, bias, routing, save, summed, backend)

    def backward(grad, x, weight, cast, gate, bias, *rest):
        *routing, kept, wants, hand_in, sum_x, backend = rest
        return _backward(
            merge, grad, x, weight, cast, gate, bias, routing, kept, wants, hand_in, sum_x, backend
        )

    def fake_forward(x, weight, cast, gate, bias, index, slots, *rest):
        n_tokens, n_groups, _ = index.shape
        n_experts, _, width = (weight if cast is None else cast).shape
        save, summed, backend = rest[-5:-2]
        out = x.new_empty((n_tokens, width) if merge and summed else (n_tokens, n_groups, width))
        kept = (n_tokens, n_experts, width) if backend == "all_experts" else (slots.shape[0], width)
        return out, x.new_empty(kept if save and not merge else 0)

    def fake_backward(grad, x, weight, cast, gate, bias, index, *rest):
        slots, wants, hand_in, sum_x = rest[1], *rest[-4:-1]
        x = x if sum_x else x.new_empty(math.prod(index.shape[:2]), x.shape[1])
        gradients = (
            grad.new_empty(source.shape, dtype=source.dtype) if wanted else grad.new_empty(0)
            for source, wanted in zip((x, weight, gate, bias), wants, strict=True)
        )
        width = (weight if cast is None else cast).shape[1 if merge else 2]
        return *gradients, grad.new_empty((slots.shape[0], width) if hand_in else 0)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, _, ctx.summed, ctx.backend, tickets, shares = inputs
        ctx.n_tickets, ctx.n_shares = len(tickets), len(shares)
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad is None:
            return *(None,) * 15, [None] * ctx.n_tickets, [None] * ctx.n_shares
        needs = ctx.needs_input_grad
        saved = ctx.saved_tensors  # once: a checkpointed layer unpacks them only once
        hand_in, apart = ctx.n_tickets > 0 and any(needs[15]), ctx.n_shares > 0 and any(needs[16])
        wants = [needs[0] or apart, needs[1], needs[3], needs[4]]
        grad = grad if ctx.summed else grad[:, 0]  # all parts have the same
        *grads, ordered = backward_packet(grad, *saved, wants, hand_in, not apart, ctx.backend)
        d_x, d_weight, d_gate, d_bias = (
            g if wanted else None for g, wanted in zip(grads, wants, strict=True)
        )
        messages: list[Tensor | None] = [None] * ctx.n_tickets
        if hand_in:
            _, slots, _, offsets, *_ = saved[5:]
            messages = [ordered, grad] if merge else [saved[0], ordered]
            messages += [as_message(slots), as_message(offsets)]
        rows: list[Tensor | None] = [None] * ctx.n_shares
        if apart:
            rows = [d_x, grad.new_empty(0, dtype=torch.float32)]
            d_x = None
        return d_x, d_weight, None, d_gate, d_bias, *(None,) * 10, messages, rows

    forward_op = torch.library.custom_op(f"moeut::{name}", forward, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(
        f"moeut::{name}_backward", backward, mutates_args=(), schema=_BACKWARD
    )
    forward_op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(differentiate, setup_context=setup_context)
    backward_packet = getattr(torch.ops.moeut, f"{name}_backward")

    @register_flop_formula(getattr(torch.ops.moeut, name))
    def _(x: Any, weight: Any, cast: Any, gate: Any, bias: Any, index: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(index) * weight[1] * weight[2]

    @register_flop_formula(backward_packet)
    def _(
        grad: Any, x: Any, weight: Any, cast: Any, gate: Any, bias: Any, index: Any, *rest: Any, **__: Any
    ) -> int:
        want_x, want_weight, want_gate, _ = rest[-4]
        n_products = int(want_x or (merge and want_gate)) + int(want_weight)
        return n_products * 2 * math.prod(index) * weight[1] * weight[2]


_register("expert_split", merge=False)
_register("expert_merge", merge=True)
