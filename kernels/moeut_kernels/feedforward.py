"""The expert feedforward of sigma-MoE: up, activation, down and the gated sum over the chosen experts, as one op.

Only what the backward reads is kept: the hidden for relu, the pre-activation for other activations; never a row of
the model width per slot. Legend: N tokens, K choices, S = N·K slots, E experts, D model width in, F expert width,
D2 model width out. Source: sigma-MoE, arXiv:2310.10837, equations 11 to 13.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moeut_kernels import activation as activations
from moeut_kernels import reference
from moeut_kernels.backend import resolve
from moeut_kernels.casting import compute_dtype, copy_for
from moeut_kernels.plan import Plan

_ROUTING = "Tensor index, Tensor slots, Tensor position, Tensor offsets, Tensor tiles"
_OPERANDS = "Tensor x, Tensor w_up, Tensor w_down, Tensor? cast_up, Tensor? cast_down, Tensor gate, Tensor? b_up, Tensor? b_down"


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
) -> Tensor:
    """Send every token through its chosen experts and add their gated outputs.

        out[n] = sum_k gate[n, 0, k] · (act(x[n] @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e]),  e = plan.index[n, 0, k]

    x: [N, D]. w_up: [E, D, F], [E, D, 2F] for gated activations (gate half first). w_down: [E, F, D2]. gate: [N, 1, K].
    b_up: [E, F] or [E, 2F]. b_down: [E, D2]. activation: one of `ACTIVATIONS`. Returns [N, D2] in the dtype of x.
    casts: copies of float32 weights in the compute dtype, see `cast_weights`. Raises `ValueError` for an unknown
    activation and for shapes that do not fit the plan.
    """
    if not torch.jit.is_tracing():
        _check(x, w_up, w_down, plan, gate, activation, b_up, b_down)
    x = x.to(compute_dtype(x))
    cast_up, cast_down = (None, None) if casts is None else casts
    cast_up, cast_down = (
        copy_for(w_up, cast_up, x.dtype, "casts[0]"),
        copy_for(w_down, cast_down, x.dtype, "casts[1]"),
    )
    operands = (x, w_up, w_down, cast_up, cast_down, gate, b_up, b_down)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    return torch.ops.moeut.expert_feedforward(*operands, *plan.tensors, activation, save, resolve(x))[0]


def _check(x, w_up, w_down, plan, gate, activation, b_up, b_down) -> None:
    if activation not in activations.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(activations.ACTIVATIONS)}")
    n_experts, factor = plan.n_experts, 2 if activations.is_gated(activation) else 1
    if plan.index.shape[1] != 1:
        raise ValueError(f"a feedforward takes a plan of one group, got index {tuple(plan.index.shape)}")
    if w_down.dim() != 3 or w_down.shape[0] != n_experts:
        raise ValueError(f"w_down must be [E, F, D2] with E={n_experts}, got {tuple(w_down.shape)}")
    if tuple(x.shape) != (plan.index.shape[0], w_up.shape[1]):
        raise ValueError(
            f"x must be {(plan.index.shape[0], w_up.shape[1])} for this plan and w_up, got {tuple(x.shape)}"
        )
    expected = {
        "w_up": (w_up, (n_experts, x.shape[1], factor * w_down.shape[1])),
        "gate": (gate, tuple(plan.index.shape)),
        "b_up": (b_up, (n_experts, factor * w_down.shape[1])),
        "b_down": (b_down, (n_experts, w_down.shape[2])),
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


@torch.library.custom_op(
    "moeut::expert_feedforward",
    mutates_args=(),
    schema=f"({_OPERANDS}, {_ROUTING}, str activation, bool save, str backend) -> (Tensor, Tensor, Tensor)",
)
def _feedforward(
    x,
    w_up,
    w_down,
    cast_up,
    cast_down,
    gate,
    b_up,
    b_down,
    index,
    slots,
    position,
    offsets,
    tiles,
    activation,
    save,
    backend,
):
    up, down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
    if backend == "triton":
        from moeut_kernels import triton_feedforward

        return triton_feedforward.forward(
            x, up, down, gate, b_up, b_down, index, slots, position, offsets, tiles, activation, save
        )
    rows = x.index_select(0, slots // index.shape[2])
    z = reference.grouped_rows(rows, up.contiguous(), offsets, backend)
    if b_up is not None:
        z = z + b_up.to(z.dtype).index_select(0, index.reshape(-1).index_select(0, slots).int())
    hidden = activations.apply(activation, z)
    products = reference.grouped_rows(hidden, down.contiguous(), offsets, backend)
    gates = gate.reshape(index.shape[0], index.shape[2])
    out = reference.gather_sum(products, position.view(gates.shape), gates)
    if b_down is not None:
        out = out + reference.gather_sum(b_down.to(out.dtype), index.reshape(gates.shape), gates)
    keeps_hidden, keeps_pre = save and activation == "relu", save and activation != "relu"
    return out, hidden if keeps_hidden else x.new_empty(0), z if keeps_pre else x.new_empty(0)


@_feedforward.register_fake
def _(
    x,
    w_up,
    w_down,
    cast_up,
    cast_down,
    gate,
    b_up,
    b_down,
    index,
    slots,
    position,
    offsets,
    tiles,
    activation,
    save,
    backend,
):
    widths = saved_widths(activation, x.dtype, w_up.shape[2], w_down.shape[1], backend) if save else (0, 0)
    kept = (x.new_empty((slots.shape[0], width) if width else 0) for width in widths)
    return x.new_empty(x.shape[0], w_down.shape[2]), *kept


@torch.library.custom_op(
    "moeut::expert_feedforward_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_OPERANDS}, {_ROUTING}, Tensor hidden, Tensor pre, str activation, bool[] wants, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _feedforward_backward(
    grad,
    x,
    w_up,
    w_down,
    cast_up,
    cast_down,
    gate,
    b_up,
    b_down,
    index,
    slots,
    position,
    offsets,
    tiles,
    hidden,
    pre,
    activation,
    wants,
    backend,
):
    """Gradients of x, w_up, w_down, gate, b_up, b_down; empty where not wanted."""
    up, down = (w_up if cast_up is None else cast_up), (w_down if cast_down is None else cast_down)
    if backend == "triton":
        from moeut_kernels import triton_feedforward

        return triton_feedforward.backward(
            grad, x, up, down, (w_up.dtype, w_down.dtype), gate, b_up, b_down,
            index, slots, position, offsets, tiles, hidden, pre, activation, wants,
        )  # fmt: skip
    want_x, want_up, want_down, want_gate, want_b_up, want_b_down = wants
    tokens = slots // index.shape[2]
    gates = gate.reshape(index.shape[0], index.shape[2])
    ordered = gate.reshape(-1).index_select(0, slots).to(grad.dtype).unsqueeze(1)
    d_x, d_up, d_down, d_gate, d_b_up, d_b_down = (grad.new_empty(0) for _ in wants)
    d_rows = grad.index_select(0, tokens)
    if activation != "relu":
        hidden = activations.apply(activation, pre)
    else:
        pre = hidden
    if want_down:
        d_down = reference.grouped_outer(hidden * ordered, d_rows, offsets, backend).to(w_down.dtype)
    if want_gate or want_x or want_up or want_b_up:
        back = reference.grouped_rows(d_rows, down.transpose(1, 2), offsets, backend)
    if want_gate:
        dots = (hidden * back).sum(1).index_select(0, position).view(gate.shape)
        if b_down is not None:
            scores = grad @ b_down.to(grad.dtype).t()
            dots = dots + scores.gather(1, index.reshape(gates.shape).long()).view(gate.shape)
        d_gate = dots.to(gate.dtype)
    if want_x or want_up or want_b_up:
        d_z = activations.backward(activation, pre, back.mul_(ordered))
        if want_x:
            back = reference.grouped_rows(d_z, up.transpose(1, 2), offsets, backend)
            d_x = reference.gather_sum(back, position.view(gates.shape))
        if want_up:
            d_up = reference.grouped_outer(x.index_select(0, tokens), d_z, offsets, backend).to(w_up.dtype)
        if want_b_up:
            d_b_up = reference.segment_sum(d_z, offsets).to(b_up.dtype)
    if want_b_down:
        dense = reference.gate_matrix(gates, index.reshape(gates.shape), w_down.shape[0])
        d_b_down = (dense.to(grad.dtype).t() @ grad).to(b_down.dtype)
    return d_x, d_up, d_down, d_gate, d_b_up, d_b_down


@_feedforward_backward.register_fake
def _(
    grad,
    x,
    w_up,
    w_down,
    cast_up,
    cast_down,
    gate,
    b_up,
    b_down,
    index,
    slots,
    position,
    offsets,
    tiles,
    hidden,
    pre,
    activation,
    wants,
    backend,
):
    sources = (x, w_up, w_down, gate, b_up, b_down)
    return tuple(
        torch.empty(source.shape, dtype=source.dtype, device=source.device) if wanted else grad.new_empty(0)
        for source, wanted in zip(sources, wants, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 16
    needs = ctx.needs_input_grad
    wants = [needs[i] for i in (0, 1, 2, 5, 6, 7)]
    grads = torch.ops.moeut.expert_feedforward_backward(
        grad, *ctx.saved_tensors, ctx.activation, wants, ctx.backend
    )
    d_x, d_up, d_down, d_gate, d_b_up, d_b_down = (
        g if wanted else None for g, wanted in zip(grads, wants, strict=True)
    )
    return d_x, d_up, d_down, None, None, d_gate, d_b_up, d_b_down, *(None,) * 8


_feedforward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.moeut.expert_feedforward)
def _forward_flops(x, w_up, w_down, cast_up, cast_down, gate, *_, **__) -> int:
    return 2 * math.prod(gate) * (w_up[1] * w_up[2] + w_down[1] * w_down[2])


@register_flop_formula(torch.ops.moeut.expert_feedforward_backward)
def _backward_flops(grad, x, w_up, w_down, cast_up, cast_down, gate, *rest, **__) -> int:
    want_x, want_up, want_down, want_gate, want_b_up, _ = rest[-2]
    n_up = int(want_x) + int(want_up)
    n_down = int(want_down) + int(want_gate or want_x or want_up or want_b_up)
    return 2 * math.prod(gate) * (n_up * w_up[1] * w_up[2] + n_down * w_down[1] * w_down[2])
