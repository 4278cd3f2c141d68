"""Rows, weights and residuals of different dtypes: autocast, copies in low precision, padded ones, and who adds in what."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.op_names import OPS


@pytest.mark.parametrize("op", OPS)
def test_autocast(cases, op):
    """Rows and weights are multiplied in the autocast dtype; gradients of float32 weights stay float32."""
    case = cases.make(op, n_tokens=64, n_groups=1 if op == "feedforward" else 2, biased=True)
    leaves = cases.leaves(case.operands, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(leaves)
    assert out.dtype == torch.bfloat16
    out.float().sin().sum().backward()
    exact = cases.leaves(case.operands, dtype=torch.float64)
    reference = case.define(exact)
    reference.sin().sum().backward()
    assert cases.error(out, reference) < 1e-2
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert cases.error(leaf.grad, exact[name].grad) < 2e-2, name


def test_casts_are_made_once_and_used(cases):
    case = cases.make("feedforward")
    o = cases.leaves(case.operands, dtype=torch.float32)
    plan = mk.plan(case.index, case.n_experts)
    casts = mk.cast_weights(o["w_up"], o["w_down"], dtype=torch.bfloat16)
    doubled = tuple(2 * c for c in casts)
    with torch.autocast("cpu", torch.bfloat16):
        plain = mk.expert_feedforward(o["x"], o["w_up"], o["w_down"], plan, o["gate"])
        given = mk.expert_feedforward(o["x"], o["w_up"], o["w_down"], plan, o["gate"], casts=casts)
        other = mk.expert_feedforward(o["x"], o["w_up"], o["w_down"], plan, o["gate"], casts=doubled)
    assert torch.equal(plain, given)
    assert torch.equal(other, 4 * plain)


@pytest.mark.parametrize("op", OPS)
def test_padded_copies_change_nothing(cases, op):
    """Sides rounded up to 16 with zeros: same output and gradients, of the shapes of the weights."""
    case = cases.make(op, n_groups=1 if op == "feedforward" else 2, d_in=13, d_hidden=9, d_out=21)
    results = []
    for padded in (False, True):
        o = cases.leaves(case.operands, dtype=torch.float32)
        plan, bf16 = mk.plan(case.index, case.n_experts), torch.bfloat16
        with torch.autocast("cpu", bf16):
            if op == "feedforward":
                casts = mk.cast_weights(o["w_up"], o["w_down"], dtype=bf16, padded=padded)
                out = mk.expert_feedforward(o["x"], o["w_up"], o["w_down"], plan, o["gate"], casts=casts)
            else:
                cast = mk.cast_weights(o["weight"], dtype=bf16, padded=padded)[0]
                project = mk.expert_split if op == "split" else mk.expert_merge
                out = project(o["x"], o["weight"], plan, o["gate"], cast=cast)
        out.float().sin().sum().backward()
        results.append([out, *(leaf.grad for leaf in o.values() if leaf is not None)])
    for plain, wide in zip(*results, strict=True):
        assert plain.shape == wide.shape
        assert cases.error(wide, plain) < 6e-3


def test_copies_of_another_shape_are_refused(cases):
    case = cases.make("split")
    o = case.operands
    x, weight, plan = o["x"].float(), o["weight"].float(), mk.plan(case.index, 5)
    cast = torch.zeros(5, 6 + 16, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="cast must be"):
        mk.expert_split(x, weight, plan, o["gate"], cast=cast)


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
def test_a_residual_is_added_in_its_own_dtype(cases, backend):
    case = cases.make("feedforward", d_in=7)
    plan = mk.plan(case.index, case.n_experts)
    o = cases.leaves(case.operands, dtype=torch.float32)
    rows, weights = o["x"].detach().bfloat16().requires_grad_(), [o["w_up"], o["w_down"]]
    residual = torch.randn(rows.shape, requires_grad=True)
    leaves, cotangent = [rows, *weights, residual, o["gate"]], torch.randn(rows.shape)

    def run(residual):
        out = mk.expert_feedforward(rows, *weights, plan, o["gate"], residual=residual)
        return out if residual is not None else out.float() + leaves[3]

    with mk.use_backend(backend):
        results = [(out, *torch.autograd.grad(out, leaves, cotangent)) for out in (run(residual), run(None))]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (
        mk.expert_feedforward(rows.float(), *weights, plan, o["gate"], residual=rows).dtype == torch.bfloat16
    )
    with pytest.raises(ValueError, match="residual"):
        mk.expert_feedforward(rows, *weights, plan, o["gate"], residual=residual[:, :3])
