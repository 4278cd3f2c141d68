"""What PyTorch is told of the ops: schemas, shapes, operations, one node in a graph, nothing kept without gradients."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.op_names import OPS


def arguments(cases, op, dtype=torch.float32, activation="relu", save=True, backend="torch"):
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
            save,
            backend,
            [],
            torch.randn_like(o["x"][:, :1]).expand(-1, o["w_down"].shape[2]).contiguous(),
            [],
        )
    operands = o["x"], o["weight"], None, o["gate"], o["bias"]
    return *operands, *plan.tensors, *plan.pairs, save, True, backend, [], []


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, backend) for op in OPS for backend in ("torch", "bmm")]
    + [("split", "all_experts"), ("merge", "all_experts")],
)
def test_opcheck(cases, op, backend):
    torch.library.opcheck(getattr(torch.ops.moeut, f"expert_{op}"), arguments(cases, op, backend=backend))


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


def test_saves_nothing_without_gradients(cases):
    kept = torch.ops.moeut.expert_feedforward(*arguments(cases, "feedforward", save=False))[1:]
    assert all(t.numel() == 0 for t in kept)
