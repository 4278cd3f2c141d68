"""The ops on CPU against dense einsums in float64: values, gradients, shapes at the edges, and what they refuse."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.op_names import OPS

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_the_definition(cases, nan_filled_empty, op, dtype, backend):
    case = cases.make(
        op, n_tokens=64, n_groups=1 if op == "feedforward" else 3, d_in=16, d_hidden=8, d_out=24
    )
    with mk.use_backend(backend):
        cases.compare(case, dtype=dtype, bound=BOUNDS[dtype])


@pytest.mark.parametrize("routing", ["one", "few"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_empty_and_full_experts(cases, nan_filled_empty, op, biased, routing):
    case = cases.make(
        op,
        n_tokens=13,
        n_groups=1 if op == "feedforward" else 2,
        routing=routing,
        biased=biased,
        n_experts=11,
    )
    cases.compare(case, dtype=torch.float64, bound=1e-12)
    cases.compare(case, dtype=torch.float32, bound=1e-5)


@pytest.mark.parametrize("op", ["split", "merge"])
def test_without_gates(cases, op):
    cases.compare(cases.make(op, n_groups=2, gated=False, biased=True), dtype=torch.float64, bound=1e-12)


@pytest.mark.parametrize("activation", mk.ACTIVATIONS)
def test_activations(cases, activation):
    case = cases.make("feedforward", activation=activation, biased=True)
    cases.compare(case, dtype=torch.float64, bound=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(cases, op):
    case = cases.make(op, n_tokens=0, biased=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cases.compare(case, dtype=dtype, bound=0)


@pytest.mark.parametrize("op", OPS)
def test_repeated_experts_add_up(cases, op):
    case = cases.make(op, n_groups=1 if op == "feedforward" else 2, top_k=3, biased=True)
    case.index = case.index % 2
    cases.compare(case, dtype=torch.float64, bound=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_non_contiguous_operands(cases, op):
    case = cases.make(
        op, n_groups=1 if op == "feedforward" else 2, d_in=16, d_hidden=8, d_out=16, biased=True
    )
    leaves = cases.leaves(case.operands, dtype=torch.float32)
    strided = {
        k: v.detach().mT.contiguous().mT.requires_grad_() if v.dim() > 1 else v for k, v in leaves.items()
    }
    assert not strided["x"].is_contiguous()
    cases.compare(case, dtype=torch.float32, bound=1e-5, leaves=strided)


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("torch", torch.float64, 1e-10), ("bmm", torch.float32, 1e-5)]
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), op=st.sampled_from(OPS), routing=st.sampled_from(["random", "one", "few"]))
def test_drawn_shapes(cases, nan_filled_empty, backend, dtype, bound, data, op, routing):
    def size(low, high):
        return data.draw(st.integers(low, high))

    n_experts = size(1, 30)
    case = cases.make(
        op,
        n_tokens=size(0, 60),
        n_groups=1 if op == "feedforward" else size(1, 4),
        top_k=size(1, min(9, n_experts)),
        n_experts=n_experts,
        d_in=size(1, 17),
        d_hidden=size(1, 9),
        d_out=size(1, 17),
        activation=data.draw(st.sampled_from(mk.ACTIVATIONS)),
        biased=data.draw(st.booleans()),
        gated=op == "feedforward" or data.draw(st.booleans()),
        routing=routing,
        seed=size(0, 999),
    )
    with mk.use_backend(backend):
        cases.compare(case, dtype=dtype, bound=bound)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(cases, op):
    case = cases.make(
        op,
        n_tokens=4,
        n_groups=1 if op == "feedforward" else 2,
        biased=True,
        activation="silu",
        d_in=3,
        d_out=2,
    )
    leaves = cases.leaves(case.operands, dtype=torch.float64)
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *values: case.run(dict(zip(names, values, strict=True))), list(leaves.values())
    )


FROZEN = [(op, name) for op in ("split", "merge") for name in ("x", "weight", "gate", "bias")]
FROZEN += [("feedforward", name) for name in ("x", "w_up", "w_down", "gate", "b_up", "b_down")]


@pytest.mark.parametrize(("op", "frozen"), FROZEN)
def test_gradients_that_nobody_wants(cases, op, frozen):
    """The other gradients are the same when one operand needs none."""
    case = cases.make(op, n_groups=1 if op == "feedforward" else 2, biased=True)
    full = cases.leaves(case.operands, dtype=torch.float64)
    case.run(full).sin().sum().backward()
    partial = cases.leaves(case.operands, dtype=torch.float64)
    partial[frozen].requires_grad_(False)
    case.run(partial).sin().sum().backward()
    assert partial[frozen].grad is None
    for name in set(full) - {frozen}:
        assert torch.equal(full[name].grad, partial[name].grad), name


@pytest.mark.parametrize("n_tokens", [11, 2731, 5461])
@pytest.mark.parametrize(("dtype", "n_experts"), [(torch.int64, 7), (torch.int8, 128)])
def test_plan_groups_slots_by_expert(n_tokens: int, dtype: torch.dtype, n_experts: int):
    """Few slots, and as many as are filled up to be sorted by radix: 16386 and 32766."""
    index = torch.randint(0, n_experts, (n_tokens, 3, 2)).to(dtype)
    plan = mk.plan(index, n_experts)
    flat = index.flatten()
    assert torch.equal(plan.slots.long(), flat.argsort(stable=True))
    assert torch.equal(plan.position[plan.slots.long()], torch.arange(6 * n_tokens, dtype=torch.int32))
    assert torch.equal(plan.offsets.diff(), torch.bincount(flat, minlength=n_experts).int())
    assert plan.n_experts == n_experts


class TestErrors:
    def test_index_rank(self):
        with pytest.raises(ValueError, match=r"index must be \[N, H, K\]"):
            mk.plan(torch.zeros(3, 2, dtype=torch.long), 4)

    def test_index_dtype(self):
        with pytest.raises(ValueError, match="integers"):
            mk.plan(torch.zeros(3, 1, 2), 4)

    def test_disjoint_groups(self):
        with pytest.raises(ValueError, match="multiple of the 3 disjoint groups"):
            mk.plan(torch.zeros(2, 3, 2, dtype=torch.long), 10, disjoint=True)

    def test_index_range(self):
        with pytest.raises(ValueError, match="outside"):
            mk.plan(torch.full((3, 1, 2), 4), 4)

    @pytest.mark.parametrize(
        ("name", "shape"), [("x", (9, 5)), ("weight", (4, 6, 7)), ("gate", (9, 1, 3)), ("bias", (5, 6))]
    )
    def test_shapes(self, cases, name, shape):
        case = cases.make("split", biased=True)
        case.operands[name] = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"{name} must be"):
            case.run(case.operands)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("x", (8, 6)),
            ("w_up", (5, 6, 5)),
            ("w_down", (4, 4, 7)),
            ("gate", (9, 2, 2)),
            ("b_up", (5, 7)),
            ("b_down", (5, 6)),
        ],
    )
    def test_feedforward_shapes(self, cases, name, shape):
        case = cases.make("feedforward", biased=True)
        case.operands[name] = torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"{name} must be"):
            case.run(case.operands)

    def test_activation(self, cases):
        case = cases.make("feedforward")
        case.activation = "tanh"
        with pytest.raises(ValueError, match="activation='tanh'"):
            case.run(case.operands)

    def test_backend(self):
        with pytest.raises(ValueError, match="not one of"), mk.use_backend("cublas"):
            pass
