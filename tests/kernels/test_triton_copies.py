"""Products with copies of float32 weights: in half precision, padded, with gradients that wait for the last use."""

from __future__ import annotations

import sys

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.op_names import OPS
from tests.kernels.triton_cases import DEVICE, HALF, TRITON

pytestmark = TRITON


@pytest.mark.parametrize("op", OPS)
def test_float32_master_weights(cases, op):
    """Rows in half precision, weights in float32: gradients of the weights come in float32."""
    case = cases.make(
        op, n_tokens=40, n_groups=1 if op == "feedforward" else 2, d_in=16, d_hidden=16, d_out=16
    )
    case.operands = {k: None if v is None else v.to(HALF).double() for k, v in case.operands.items()}
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    leaves["x"] = leaves["x"].detach().to(HALF).requires_grad_()
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=4e-3, leaves=leaves, cotangent_dtype=HALF)


@pytest.mark.parametrize("op", OPS)
def test_padded_copies_of_odd_widths(cases, op):
    """Copies are wider than their weights: results and gradients have the shapes of the weights."""
    case = cases.make(
        op, n_tokens=40, n_groups=1 if op == "feedforward" else 2, d_in=21, d_hidden=10, d_out=37
    )
    plan = mk.plan(case.index.to(DEVICE), case.n_experts)
    case.operands = {k: None if v is None else v.to(HALF).double() for k, v in case.operands.items()}
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    leaves["x"] = leaves["x"].detach().to(HALF).requires_grad_()
    weights = [leaves[name] for name in ("w_up", "w_down", "weight") if name in leaves]
    casts = mk.cast_weights(*weights, dtype=HALF, padded=True)
    assert all(side % 16 == 0 for cast in casts for side in cast.shape[1:])

    def run(o, _):
        if op == "feedforward":
            return mk.expert_feedforward(o["x"], *weights, plan, o["gate"], casts=casts)
        return (mk.expert_split if op == "split" else mk.expert_merge)(
            o["x"], *weights, plan, o["gate"], cast=casts[0]
        )

    case.run = run
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=4e-3, leaves=leaves)


def test_deferred_gradients(cases):
    """Three uses of one feedforward with different routings: one gradient, of the odd shape of the weight."""
    case = cases.make("feedforward", n_tokens=40, d_in=21, d_hidden=10, d_out=37)
    w_up, w_down = (
        case.operands[name].to(HALF).float().to(DEVICE).requires_grad_() for name in ("w_up", "w_down")
    )
    casts = mk.cast_weights(w_up, w_down, dtype=HALF, padded=True)
    tickets = mk.feedforward_tickets(w_up, w_down, 3, casts=casts, n_tokens=40, top_k=2)
    total, expected = 0.0, 0.0
    exact = [w.detach().double().cpu().requires_grad_() for w in (w_up, w_down)]
    for shift in range(3):
        x, gate = case.operands["x"].roll(shift, 0).to(HALF), case.operands["gate"].float()
        index = (case.index + shift) % 5
        cotangent = torch.randn(40, 37, dtype=torch.float64).to(HALF)
        out = mk.expert_feedforward(
            x.to(DEVICE), w_up, w_down, mk.plan(index.to(DEVICE), 5), gate.to(DEVICE), casts=casts,
            tickets=tickets[shift],
        )  # fmt: skip
        total = total + (out * cotangent.to(DEVICE)).float().sum()
        operands = {
            **case.operands,
            "x": x.double(),
            "gate": gate.double(),
            "w_up": exact[0],
            "w_down": exact[1],
        }
        defined = cases.Case("feedforward", index, 5, operands).define(operands)
        expected = expected + (defined * cotangent.double()).sum()
    total.backward()
    expected.backward()
    for ours, wanted in zip((w_up, w_down), exact, strict=True):
        assert cases.error(ours.grad, wanted.grad) < 4e-3


@pytest.mark.parametrize("disjoint", [True, False], ids=["pairs", "many pairs"])
@pytest.mark.parametrize("op", ["split", "merge"])
def test_deferred_gradients_of_projections(cases, monkeypatch, op, disjoint):
    """Three uses with different routings: one gradient, of the odd shape of the weight."""
    n_experts = 12
    monkeypatch.setattr(
        sys.modules["moeut_kernels.plan"], "MOST_PAIRS", 77
    )  # one fewer than joint groups have
    case = cases.make(op, n_tokens=40, n_groups=3, n_experts=n_experts, d_in=21, d_out=37)
    if disjoint:
        case.index = case.index % 4 + 4 * torch.arange(3)[:, None]
    weight = case.operands["weight"].to(HALF).float().to(DEVICE).requires_grad_()
    (cast,) = mk.cast_weights(weight, dtype=HALF, padded=True)
    tickets = mk.projection_tickets(
        weight, 3, merge=op == "merge", cast=cast, n_tokens=40, n_groups=3, top_k=case.index.shape[2]
    )
    exact = weight.detach().double().cpu().requires_grad_()
    total, expected = 0.0, 0.0
    for shift, ticket in enumerate(tickets):
        x, gate = case.operands["x"].roll(shift, 0).to(HALF), case.operands["gate"].float().roll(shift, 0)
        index = case.index.roll(2 * shift, 0)
        plan = mk.plan(index.to(DEVICE), n_experts, disjoint=disjoint)
        assert (plan.low_slots.numel() > 0) == disjoint
        apply = mk.expert_split if op == "split" else mk.expert_merge
        out = apply(x.to(DEVICE), weight, plan, gate.to(DEVICE), cast=cast, ticket=ticket)
        cotangent = torch.randn(out.shape, dtype=torch.float64).to(HALF)
        total = total + (out * cotangent.to(DEVICE)).float().sum()
        operands = {**case.operands, "x": x.double(), "gate": gate.double(), "weight": exact}
        defined = cases.Case(op, index, n_experts, operands).define(operands)
        expected = expected + (defined * cotangent.double()).sum()
    total.backward()
    expected.backward()
    assert cases.error(weight.grad, exact.grad) < 4e-3


@pytest.mark.parametrize("d_in", [21, 32], ids=["padded", "even"])
def test_a_residual_in_float32(cases, d_in):
    """Rows in half precision are added to a residual that is wider, once; padded columns are no part of it."""
    case = cases.make("feedforward", n_tokens=40, d_in=d_in, d_hidden=16, d_out=d_in)
    leaves = {
        name: case.operands[name].to(HALF).float().to(DEVICE).requires_grad_() for name in ("w_up", "w_down")
    }
    x = case.operands["x"].to(HALF).to(DEVICE).requires_grad_()
    gate = case.operands["gate"].float().to(DEVICE).requires_grad_()
    residual = torch.randn(40, d_in, device=DEVICE, requires_grad=True)
    casts = mk.cast_weights(*leaves.values(), dtype=HALF, padded=True)
    plan = mk.plan(case.index.to(DEVICE), case.n_experts)
    out = mk.expert_feedforward(x, *leaves.values(), plan, gate, casts=casts, residual=residual)
    assert out.dtype == torch.float32
    operands = {**case.operands, "x": x, "gate": gate, **leaves}
    exact = {
        k: v.detach().double().cpu().requires_grad_() if v is not None else None for k, v in operands.items()
    }
    wide = residual.detach().double().cpu().requires_grad_()
    expected = case.define(exact) + wide
    cotangent = torch.randn(expected.shape, dtype=torch.float64).to(HALF)
    out.backward(cotangent.float().to(DEVICE))
    expected.backward(cotangent.double())
    assert cases.error(out, expected) < 4e-3
    pairs = [
        (x, exact["x"]),
        (gate, exact["gate"]),
        (residual, wide),
        *((leaves[n], exact[n]) for n in leaves),
    ]
    assert all(cases.error(ours.grad, wanted.grad) < 4e-3 for ours, wanted in pairs)
