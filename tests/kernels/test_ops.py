"""The ops on CPU against dense einsums in float64: values, gradients, shapes at the edges, and torch.library contracts."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

OPS = ["split", "merge", "feedforward"]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), op=st.sampled_from(OPS))
def test_drawn_shapes(cases, data, op):
    def size(low, high):
        return data.draw(st.integers(low, high))

    n_experts = size(1, 9)
    case = cases.make(
        op,
        n_tokens=size(0, 20),
        n_groups=1 if op == "feedforward" else size(1, 4),
        top_k=size(1, n_experts),
        n_experts=n_experts,
        d_in=size(1, 17),
        d_hidden=size(1, 9),
        d_out=size(1, 17),
        activation=data.draw(st.sampled_from(mk.ACTIVATIONS)),
        biased=data.draw(st.booleans()),
        gated=op == "feedforward" or data.draw(st.booleans()),
        seed=size(0, 999),
    )
    cases.compare(case, dtype=torch.float64, bound=1e-10)


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


def arguments(cases, op, dtype=torch.float32, activation="relu"):
    case = cases.make(op, n_groups=1 if op == "feedforward" else 2, biased=True, activation=activation)
    o = cases.leaves(case.operands, dtype=dtype)
    plan = mk.plan(case.index, case.n_experts)
    if op == "feedforward":
        return (
            o["x"],
            o["w_up"],
            o["w_down"],
            None,
            None,
            o["gate"],
            o["b_up"],
            o["b_down"],
            *plan.tensors,
            activation,
            True,
            "torch",
            [],
            torch.randn_like(o["x"][:, :1]).expand(-1, o["w_down"].shape[2]).contiguous(),
        )
    return o["x"], o["weight"], None, o["gate"], o["bias"], *plan.tensors, *plan.pairs, True, "torch", []


@pytest.mark.parametrize("op", OPS)
def test_opcheck(cases, op):
    torch.library.opcheck(getattr(torch.ops.moeut, f"expert_{op}"), arguments(cases, op))


def test_opcheck_keeps_the_pre_activation(cases):
    torch.library.opcheck(
        torch.ops.moeut.expert_feedforward, arguments(cases, "feedforward", activation="swiglu")
    )


def test_opcheck_plan():
    torch.library.opcheck(torch.ops.moeut.plan, (torch.randint(0, 5, (7, 2, 3)), 5, 5, "torch"))


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph(cases, op):
    """Plan and product in one full graph; values and gradients bit-equal to eager."""
    case = cases.make(op, n_tokens=16, n_groups=1 if op == "feedforward" else 2, biased=True)
    results = []
    for run in (case.run, torch.compile(case.run, fullgraph=True, backend="aot_eager")):
        leaves = cases.leaves(case.operands, dtype=torch.float32)
        out = run(leaves)
        out.sin().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("op", OPS)
def test_floating_point_operations(cases, op):
    """2 x MACs of the chosen experts: one product forward, two backward."""
    case = cases.make(
        op, n_tokens=8, n_groups=1 if op == "feedforward" else 2, top_k=3, d_in=5, d_hidden=4, d_out=6
    )
    slots = case.index.numel()
    forward = 2 * slots * (5 * 4 + 4 * 6) if op == "feedforward" else 2 * slots * 5 * 6
    for device in ("cpu", "meta"):
        leaves = cases.leaves(case.operands, dtype=torch.float32, device=device)
        with FlopCounterMode(display=False) as counter:
            out = case.run(leaves)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("op", OPS)
def test_meta_shapes(cases, op):
    case = cases.make(op, n_groups=1 if op == "feedforward" else 3)
    real = case.run(cases.leaves(case.operands, dtype=torch.float32))
    leaves = cases.leaves(case.operands, dtype=torch.float32, device="meta")
    meta = case.run(leaves)
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
    meta.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values() if leaf is not None)


@pytest.mark.parametrize("op", OPS)
def test_traces_as_one_node(cases, op):
    """torch.jit.trace on meta tensors, the way MAC counters look at a model, sees one node for each op."""
    case = cases.make(op, n_groups=1 if op == "feedforward" else 2)
    leaves = {k: None if v is None else v.float().to("meta") for k, v in case.operands.items()}
    index = case.index.to("meta")
    case.index = index
    graph = torch.jit.trace(lambda x: case.run({**leaves, "x": x}), leaves["x"], check_trace=False).graph
    kinds = [node.kind() for node in graph.nodes() if node.kind().startswith("moeut::")]
    assert kinds == ["moeut::plan", f"moeut::expert_{op}"]


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


def test_saves_nothing_without_gradients(cases):
    case = cases.make("feedforward")
    plan = mk.plan(case.index, case.n_experts)
    o = case.operands
    kept = torch.ops.moeut.expert_feedforward(
        o["x"],
        o["w_up"],
        o["w_down"],
        None,
        None,
        o["gate"],
        None,
        None,
        *plan.tensors,
        "relu",
        False,
        "torch",
        [],
        None,
    )[1:]
    assert all(t.numel() == 0 for t in kept)


def test_plan_groups_slots_by_expert():
    index = torch.randint(0, 7, (11, 3, 2))
    plan = mk.plan(index, 7)
    flat = index.flatten()
    assert torch.equal(plan.slots.long(), flat.argsort(stable=True))
    assert torch.equal(plan.position[plan.slots.long()], torch.arange(66, dtype=torch.int32))
    assert torch.equal(plan.offsets.diff(), torch.bincount(flat, minlength=7).int())
    assert plan.n_experts == 7


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


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
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
