"""Every product on Triton, forward and backward, against dense einsums in float64."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.op_names import OPS
from tests.kernels.triton_cases import DEVICE, DTYPES, TRITON, check

pytestmark = TRITON


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_tile(cases, op, dtype):
    """Sizes that are multiples of a tile of the interpreter, and of none on a GPU."""
    check(
        cases,
        op,
        dtype,
        n_tokens=16,
        n_groups=1 if op == "feedforward" else 2,
        d_in=16,
        d_hidden=16,
        d_out=16,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_tiles_of_odd_sizes(cases, op, dtype):
    n_groups = 1 if op == "feedforward" else 3
    check(
        cases,
        op,
        dtype,
        n_tokens=75,
        n_groups=n_groups,
        top_k=3,
        n_experts=4,
        d_in=37,
        d_hidden=21,
        d_out=35,
        biased=True,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["split", "merge"])
def test_pairs_of_experts(cases, op, dtype):
    """Two choices and no bias: both experts of an item in one program."""
    check(cases, op, dtype, n_tokens=70, n_groups=2, top_k=2, n_experts=2, d_in=20, d_out=35)
    check(cases, op, dtype, n_tokens=12, n_groups=3, top_k=2, n_experts=5, d_in=48, d_out=16)


@pytest.mark.parametrize("op", ["split", "merge"])
def test_pairs_of_disjoint_groups(cases, op):
    """Heads with experts of their own: the same result from fewer pairs."""
    case = cases.make(op, n_tokens=12, n_groups=3, top_k=2, n_experts=4, d_in=16, d_out=16)
    case.index = case.index + 4 * torch.arange(3)[:, None]
    case.n_experts = 12
    case.operands["weight"] = torch.randn(12, 16, 16, dtype=torch.float64)
    plan = mk.plan(case.index.to(DEVICE), 12, disjoint=True)
    assert plan.pair_tiles.shape[0] < mk.plan(case.index.to(DEVICE), 12).pair_tiles.shape[0]
    seen = {tuple(row[:2]) for row in plan.pair_tiles.tolist() if row[0] >= 0}
    assert seen == {tuple(sorted(pair)) for pair in case.index.flatten(0, 1).tolist()}
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5, plan=plan)


@pytest.mark.parametrize("op", ["split", "merge"])
def test_pairs_of_equal_experts(cases, op):
    case = cases.make(op, n_tokens=30, n_groups=2, top_k=2, d_in=16, d_out=16)
    case.index = case.index % 3
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("op", ["split", "merge"])
def test_without_gates(cases, op, top_k):
    check(cases, op, torch.float32, n_tokens=20, n_groups=2, gated=False, top_k=top_k)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", mk.ACTIVATIONS)
def test_activations(cases, activation, biased):
    dtype = DTYPES[-1] if biased else torch.float32
    check(cases, "feedforward", dtype, n_tokens=24, activation=activation, biased=biased, d_hidden=20)


@pytest.mark.parametrize("routing", ["one", "few"])
@pytest.mark.parametrize("op", OPS)
def test_empty_and_full_experts(cases, op, routing):
    check(
        cases,
        op,
        torch.float32,
        n_tokens=70,
        n_groups=1 if op == "feedforward" else 2,
        routing=routing,
        n_experts=11,
    )


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(cases, op):
    for biased in (False, True):
        case = cases.make(op, n_tokens=0, n_groups=1 if op == "feedforward" else 2, biased=biased)
        cases.compare(case, dtype=torch.float32, device=DEVICE, bound=0)


@pytest.mark.parametrize("op", OPS)
def test_one_token(cases, op):
    check(cases, op, torch.float32, n_tokens=1, n_groups=1 if op == "feedforward" else 2, n_experts=7)


def test_wide_experts(cases):
    """A hidden wider than a walk takes, in several column tiles: gate gradients come in parts."""
    check(cases, "feedforward", torch.float32, n_tokens=10, n_experts=2, d_hidden=264, d_in=16, d_out=16)


@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_operands(cases, op):
    case = cases.make(op, n_tokens=20, n_groups=1 if op == "feedforward" else 2, biased=op == "feedforward")
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    strided = {
        k: v.detach().mT.contiguous().mT.requires_grad_() if v is not None and v.dim() > 1 else v
        for k, v in leaves.items()
    }
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5, leaves=strided)


@pytest.mark.parametrize("gate", [0.0, 1e-35, -1e-33, -0.5])
def test_gates_near_zero_and_below(cases, gate):
    """The backward divides by the gate: its gradient is right where the gate is nothing, tiny or negative."""
    case = cases.make("feedforward", n_tokens=12)
    case.operands["gate"][::2] = gate
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5)


def test_all_gates_zero(cases):
    case = cases.make("feedforward", n_tokens=12)
    case.operands["gate"].zero_()
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    assert case.run(leaves).abs().max() < 1e-25
