"""The expert feedforward of sigma-MoE: up, activation, down and the gated sum over the chosen experts, as one op.

Only what the backward reads is kept: the hidden for relu, the pre-activation for other activations; never a row of
the model width per slot. Legend: N tokens, K choices, S = N·K slots, E experts, D model width in, F expert width,
D2 model width out. Source: sigma-MoE, arXiv:2310.10837.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeut_kernels import activation as activations
from moeut_kernels import reference
from moeut_kernels.backend import resolve
from moeut_kernels.casting import compute_dtype, copy_for, of_master, widen
from moeut_kernels.deferral import Ticket, as_message, defer
from moeut_kernels.layout import lay_out
from moeut_kernels.norm import Shares, ShareShape
from moeut_kernels.plan import Plan

_OPERANDS = (
    "Tensor x, Tensor w_up, Tensor w_down, Tensor? cast_up, Tensor? cast_down, "
    "Tensor gate, Tensor? b_up, Tensor? b_down"
)
_ROUTING = "Tensor index, Tensor slots, Tensor position, Tensor offsets, Tensor tiles"
_FORWARD = (
    f"({_OPERANDS}, {_ROUTING}, str activation, bool save, str backend, Tensor[] tickets, Tensor? residual,"
    " Tensor[] shares) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor grad, {_OPERANDS}, {_ROUTING}, Tensor hidden, Tensor pre, str activation, bool[] wants, bool hand_in,"
    " bool sum_x, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def expert_feedforward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    plan: Plan,
    gate: Tensor,
    *,
    activation: str = "relu",
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    casts: tuple[Tensor, Tensor] | None = None,
    tickets: tuple[Ticket, Ticket] | None = None,
    residual: Tensor | None = None,
    shares: Shares | None = None,
) -> Tensor:
    """Send every token through its chosen experts and add their gated outputs.

        out[n] = sum_k gate[n, 0, k] · (act(x[n] @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e]),  e = plan.index[n, 0, k]

    x: [N, D]. w_up: [E, D, F], [E, D, 2F] for gated activations (gate half first). w_down: [E, F, D2].
    gate: [N, 1, K]. b_up: [E, F] or [E, 2F]. b_down: [E, D2]. activation: one of `ACTIVATIONS`. Returns [N, D2] in the
    dtype of x. casts: copies of float32 weights in the compute dtype, see `cast_weights`. tickets: of this use, see
    `feedforward_tickets`; the weights then get their gradients from all uses at once. residual: [N, D2], added to the
    result, which then has its dtype: written once instead of twice. shares: of the `norm_fan` that made x, which then
    gets the gradient of x in unsummed rows, see `feedforward_shares`. Raises `ValueError` for an unknown activation and
    for shapes that do not fit the plan.
    """
    if not torch.jit.is_tracing():
        _check(x, w_up, w_down, plan, gate, activation, b_up, b_down, residual)
    x = x.to(compute_dtype(x))
    cast_up, cast_down = (None, None) if casts is None else casts
    cast_up, cast_down = (
        copy_for(w_up, cast_up, x.dtype, "casts[0]"),
        copy_for(w_down, cast_down, x.dtype, "casts[1]"),
    )
    width = w_down.shape[2]
    x = widen(x, w_up.shape[1] if cast_up is None else cast_up.shape[1])
    handed: list[Tensor] = []
    if tickets is not None:
        w_up, w_down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
        w_up, w_down, cast_up, cast_down = w_up.detach(), w_down.detach(), None, None
        handed = [part for ticket in tickets for part in ticket]
    operands = (x, w_up, w_down, cast_up, cast_down, gate, b_up, b_down)
    apart = list(shares or ())
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*operands, *handed, *apart)
    )
    padded = not torch.jit.is_tracing() and (w_down if cast_down is None else cast_down).shape[2] != width
    added = None if padded else residual
    each = plan.index.numel() // plan.n_experts, w_down.shape[1] * w_down.shape[2]
    out = torch.ops.moeut.expert_feedforward(
        *operands, *plan.tensors, activation, save, resolve(x, each), handed, added, apart
    )[0]
    if not padded:
        return out
    return out[:, :width] if residual is None else (residual + out[:, :width]).to(residual.dtype)


def feedforward_tickets(
    w_up: Tensor, w_down: Tensor, n_uses: int, *, casts: tuple[Tensor, Tensor], n_tokens: int, top_k: int
) -> list[tuple[Ticket, Ticket]]:
    """Tickets of `n_uses` calls of `expert_feedforward` with these weights and `casts`, on `n_tokens` tokens each."""
    n_slots, (up_cast, down_cast) = n_tokens * top_k, casts
    up = defer(
        w_up, n_uses, left=(n_tokens, up_cast.shape[1]), right=(n_slots, up_cast.shape[2]), dtype=up_cast.dtype,
        n_slots=n_slots, per_left=top_k, per_right=None,
    )  # fmt: skip
    down = defer(
        w_down, n_uses, left=(n_slots, down_cast.shape[1]), right=(n_tokens, down_cast.shape[2]),
        dtype=down_cast.dtype, n_slots=n_slots, per_left=None, per_right=top_k,
    )  # fmt: skip
    return list(zip(up, down, strict=True))


def feedforward_shares(x: Tensor, w_up: Tensor, top_k: int) -> ShareShape:
    """What `expert_feedforward` hands back of the gradient of x [..., D]. w_up: the weight it reads, or its copy."""
    return ShareShape(x.shape[:-1].numel() * top_k, w_up.shape[1], listed=True)


def _check(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    plan: Plan,
    gate: Tensor,
    activation: str,
    b_up: Tensor | None,
    b_down: Tensor | None,
    residual: Tensor | None,
) -> None:
    if activation not in activations.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(activations.ACTIVATIONS)}")
    index, n_experts = plan.index, plan.n_experts
    if index.shape[1] != 1:
        raise ValueError(f"a feedforward takes a plan of one group, got index {tuple(index.shape)}")
    for name, weight in (("w_up", w_up), ("w_down", w_down)):
        if weight.dim() != 3 or weight.shape[0] != n_experts:
            raise ValueError(
                f"{name} must be [E, rows, columns] with E={n_experts}, got {tuple(weight.shape)}"
            )
    width = w_down.shape[1] * (2 if activations.is_gated(activation) else 1)
    expected = {
        "x": (x, (index.shape[0], w_up.shape[1])),
        "w_up": (w_up, (n_experts, w_up.shape[1], width)),
        "gate": (gate, tuple(index.shape)),
        "b_up": (b_up, (n_experts, width)),
        "b_down": (b_down, (n_experts, w_down.shape[2])),
        "residual": (residual, (index.shape[0], w_down.shape[2])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def saved_widths(
    activation: str, dtype: torch.dtype, d_up: int, d_hidden: int, backend: str
) -> tuple[int, int]:
    """Columns kept for the backward: of the hidden and of the pre-activation.

    PyTorch keeps the ungated hidden for relu, else the pre-activation. Triton always keeps the gated hidden, and needs
    the pre-activation besides where the hidden over the gate does not give it back: other activations, and float16
    with its small exponents.
    """
    if backend != "triton":
        return (d_hidden, 0) if activation == "relu" else (0, d_up)
    return d_hidden, 0 if activation == "relu" and dtype != torch.float16 else d_up


def _forward(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    cast_up: Tensor | None,
    cast_down: Tensor | None,
    gate: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the kept hidden and pre-activation."""
    *routing, activation, save, backend, _, residual, _ = rest
    up, down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
    if backend == "triton":
        from moeut_kernels import triton_feedforward

        return triton_feedforward.forward(
            x, up, down, gate, b_up, b_down, routing, activation, save, residual
        )
    index, slots, position, offsets, _ = routing
    layout = lay_out(slots, position, offsets, backend)
    z = layout.multiply(x.index_select(0, layout.slots // index.shape[2]), up.contiguous())
    if b_up is not None:
        z += b_up.to(z.dtype).index_select(0, index.reshape(-1).index_select(0, layout.slots).int())
    hidden = activations.apply(activation, z)
    products = layout.multiply(hidden, down.contiguous())
    gates = gate.reshape(index.shape[0], index.shape[2])
    out = reference.gather_sum(products, layout.position.view(gates.shape), gates)
    if b_down is not None:
        out += reference.gather_sum(b_down.to(out.dtype), index.reshape(gates.shape), gates)
    if residual is not None:
        out = (residual + out).to(residual.dtype)
    keeps_hidden, keeps_pre = save and activation == "relu", save and activation != "relu"
    return (
        out,
        layout.packed(hidden) if keeps_hidden else x.new_empty(0),
        layout.packed(z) if keeps_pre else x.new_empty(0),
    )


def _fake_forward(x, w_up, w_down, cast_up, cast_down, gate, b_up, b_down, index, slots, *rest):  # type: ignore[no-untyped-def]
    activation, save, backend, _, residual, _ = rest[3:]
    w_up, w_down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
    widths = saved_widths(activation, x.dtype, w_up.shape[2], w_down.shape[1], backend) if save else (0, 0)
    kept = (x.new_empty((slots.shape[0], width) if width else 0) for width in widths)
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty(x.shape[0], w_down.shape[2], dtype=dtype), *kept


def _backward(
    grad: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    cast_up: Tensor | None,
    cast_down: Tensor | None,
    gate: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of x, w_up, w_down, gate, b_up, b_down, and what is handed in; empty where not wanted.

    That of x in unsummed rows in expert order unless sum_x. Handed in: the gradient of the pre-activation, the gated
    hidden (empty where it was kept).
    """
    *routing, hidden, pre, activation, wants, hand_in, sum_x, backend = rest
    up, down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
    if backend == "triton":
        from moeut_kernels import triton_feedforward

        masters = (w_up, w_down)
        return triton_feedforward.backward(
            grad, x, up, down, masters, gate, b_up, b_down, routing, hidden, pre, activation, wants, hand_in, sum_x
        )  # fmt: skip
    index, slots, position, offsets, _ = routing
    want_x, want_up, want_down, want_gate, want_b_up, want_b_down = wants
    d_x, d_up, d_down, d_gate, d_b_up, d_b_down = (grad.new_empty(0) for _ in wants)
    layout = lay_out(slots, position, offsets, backend)
    tokens = layout.slots // index.shape[2]
    gates, choices = (
        gate.reshape(index.shape[0], index.shape[2]),
        index.reshape(index.shape[0], index.shape[2]),
    )
    gate_rows = layout.gates(gate).to(grad.dtype)
    d_rows = grad.index_select(0, tokens)
    pre = layout.spread(hidden if activation == "relu" else pre)
    hidden = pre if activation == "relu" else activations.apply(activation, pre)
    needs_z = want_x or want_up or want_b_up or hand_in
    if want_down:
        d_down = of_master(layout.outer(hidden * gate_rows, d_rows), w_down)
    if want_gate or needs_z:
        back = layout.multiply(d_rows, down.transpose(1, 2))
    if want_gate:
        dots = (hidden * back).sum(1).index_select(0, layout.position).view(gate.shape)
        if b_down is not None:
            dots += (grad @ b_down.to(grad.dtype).t()).gather(1, choices.long()).view(gate.shape)
        d_gate = dots.to(gate.dtype)
    if needs_z:
        d_z = activations.backward(activation, pre, back.mul_(gate_rows))
    if want_x:
        d_x = layout.multiply(d_z, up.transpose(1, 2))
        d_x = reference.gather_sum(d_x, layout.position.view(gates.shape)) if sum_x else layout.packed(d_x)
    if want_up:
        d_up = of_master(layout.outer(x.index_select(0, tokens), d_z), w_up)
    if want_b_up:
        d_b_up = reference.segment_sum(layout.packed(d_z), offsets).to(b_up.dtype)
    if want_b_down:
        dense = reference.gate_matrix(gates, choices, w_down.shape[0]).to(grad.dtype)
        d_b_down = (dense.t() @ grad).to(b_down.dtype)
    if hand_in:
        message = layout.packed(d_z), layout.packed(hidden * gate_rows)
    else:
        message = grad.new_empty(0), grad.new_empty(0)
    return d_x, d_up, d_down, d_gate, d_b_up, d_b_down, *message


def _fake_backward(grad, x, w_up, w_down, cast_up, cast_down, gate, b_up, b_down, *rest):  # type: ignore[no-untyped-def]
    slots, wants, hand_in, sum_x, backend = rest[1], *rest[-4:]
    x = x if sum_x else x.new_empty(slots.shape[0], (w_up if cast_up is None else cast_up).shape[1])
    sources = zip((x, w_up, w_down, gate, b_up, b_down), wants, strict=True)
    gradients = (
        grad.new_empty(source.shape, dtype=source.dtype) if wanted else grad.new_empty(0)
        for source, wanted in sources
    )
    rows, d_pre, d_hidden = slots.shape[0], (w_up if cast_up is None else cast_up).shape[2], w_down.shape[1]
    return (
        *gradients,
        grad.new_empty((rows, d_pre) if hand_in else 0),
        grad.new_empty((rows, d_hidden) if hand_in and backend != "triton" else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.activation, _, ctx.backend, tickets, _, shares = inputs
    ctx.n_tickets, ctx.n_shares = len(tickets), len(shares)
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return *(None,) * 16, [None] * ctx.n_tickets, None, [None] * ctx.n_shares
    saved = ctx.saved_tensors  # once: a checkpointed layer unpacks them only once
    needs = ctx.needs_input_grad
    hand_in = ctx.n_tickets > 0 and any(needs[16])
    apart = ctx.n_shares > 0 and any(needs[18])
    wants = [needs[0] or apart, *(needs[i] for i in (1, 2, 5, 6, 7))]
    d_residual = grad if needs[17] else None
    grad = grad.to(saved[0].dtype)
    *grads, d_pre, gated = torch.ops.moeut.expert_feedforward_backward(
        grad, *saved, ctx.activation, wants, hand_in, not apart, ctx.backend
    )
    d_x, d_up, d_down, d_gate, d_b_up, d_b_down = (
        g if wanted else None for g, wanted in zip(grads, wants, strict=True)
    )
    messages: list[Tensor | None] = [None] * ctx.n_tickets
    if hand_in:
        x, slots, offsets = saved[0], as_message(saved[9]), as_message(saved[11])
        hidden = saved[13] if ctx.backend == "triton" else gated
        messages = [x, d_pre, slots, offsets, hidden, grad, slots, offsets]
    rows: list[Tensor | None] = [None] * ctx.n_shares
    if apart:
        d_x, rows = None, [d_x, as_message(saved[10])]
    return d_x, d_up, d_down, None, None, d_gate, d_b_up, d_b_down, *(None,) * 8, messages, d_residual, rows


_op = torch.library.custom_op("moeut::expert_feedforward", _forward, mutates_args=(), schema=_FORWARD)
_backward_op = torch.library.custom_op(
    "moeut::expert_feedforward_backward", _backward, mutates_args=(), schema=_BACKWARD
)
_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)
_op.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.moeut.expert_feedforward)
def _forward_flops(
    x: Any, w_up: Any, w_down: Any, cast_up: Any, cast_down: Any, gate: Any, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(gate) * (w_up[1] * w_up[2] + w_down[1] * w_down[2])


@register_flop_formula(torch.ops.moeut.expert_feedforward_backward)
def _backward_flops(
    grad: Any, x: Any, w_up: Any, w_down: Any, cast_up: Any, cast_down: Any, gate: Any, *rest: Any, **__: Any
) -> int:
    want_x, want_up, want_down, want_gate, want_b_up, _ = rest[-4]
    n_up = int(want_x) + int(want_up)
    n_down = int(want_down) + int(want_gate or want_x or want_up or want_b_up or rest[-3])
    return 2 * math.prod(gate) * (n_up * w_up[1] * w_up[2] + n_down * w_down[1] * w_down[2])
