"""What only a GPU can show: full tiles, repeats to the bit, CUDA graphs, compilation, the other back ends."""

from __future__ import annotations

import random

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.op_names import OPS
from tests.kernels.triton_cases import DEVICE, INTERPRETED, TRITON, check

pytestmark = [
    *TRITON,
    pytest.mark.skipif(INTERPRETED, reason="needs real tiles, the CUDA allocator and graphs"),
]


@pytest.mark.parametrize("draw", range(20))
def test_drawn_shapes_fill_real_tiles(cases, draw):
    """Twenty shapes drawn anew each run; the message of a failure names the seed."""
    seed = random.SystemRandom().randrange(2**31)
    r = random.Random(seed)
    op, dtype = r.choice(OPS), r.choice([torch.float32, torch.bfloat16])
    n_experts = r.choice([1, 7, 40, 65])
    kwargs = {
        # few tokens only in float32: a single gate's gradient is a sum that may cancel beyond what bfloat16 leaves of it
        "n_tokens": r.choice([1, 130, 700] if dtype == torch.float32 else [20, 130, 700]),
        "n_groups": 1 if op == "feedforward" else r.randint(1, 4),
        "top_k": r.randint(1, min(4, n_experts)),
        "n_experts": n_experts,
        "d_in": r.choice([64, 128, 200, 99]),
        "d_hidden": r.choice([32, 128, 200, 72]),
        "d_out": r.choice([64, 128, 256, 131]),
        "activation": r.choice(mk.ACTIVATIONS),
        "biased": r.random() < 0.3,
        "routing": r.choice(["random", "random", "one"]),
        "seed": seed,
    }
    try:
        check(cases, op, dtype, **kwargs)
    except AssertionError as error:
        raise AssertionError(f"{op} {dtype} {kwargs}") from error


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit(cases, op):
    case = cases.make(
        op,
        n_tokens=500,
        n_groups=1 if op == "feedforward" else 4,
        d_in=128,
        d_hidden=128,
        d_out=128,
        n_experts=20,
    )
    runs = []
    for _ in range(2):
        leaves = cases.leaves(case.operands, dtype=torch.bfloat16, device=DEVICE)
        out = case.run(leaves)
        out.float().sin().sum().backward()
        runs.append([out.detach(), *(v.grad for v in leaves.values() if v is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_captures_in_a_graph(cases, op):
    """Routing, forward and backward in one CUDA graph: a host synchronisation would fail the capture."""
    case = cases.make(
        op, n_tokens=300, n_groups=1 if op == "feedforward" else 2, d_in=64, d_hidden=64, d_out=64
    )
    leaves = cases.leaves(case.operands, dtype=torch.bfloat16, device=DEVICE)
    case.index = case.index.to(DEVICE)
    names = [k for k, v in leaves.items() if v is not None]

    def step():
        out = case.run(leaves)
        return [out, *torch.autograd.grad(out.float().sin().sum(), [leaves[k] for k in names])]

    expected = [t.detach().clone() for t in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph(cases, op):
    case = cases.make(
        op, n_tokens=64, n_groups=1 if op == "feedforward" else 2, d_in=64, d_hidden=64, d_out=64
    )
    case.index = case.index.to(DEVICE)
    results = []
    for run in (case.run, torch.compile(case.run, fullgraph=True)):
        leaves = cases.leaves(case.operands, dtype=torch.bfloat16, device=DEVICE)
        out = run(leaves)
        out.float().sum().backward()
        results.append([out.detach(), *(v.grad for v in leaves.values() if v is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
def test_plain_backends(cases, backend):
    with mk.use_backend(backend):
        for op in OPS:
            case = cases.make(
                op, n_tokens=64, n_groups=1 if op == "feedforward" else 2, d_in=64, d_hidden=64, d_out=64
            )
            cases.compare(case, dtype=torch.bfloat16, device=DEVICE, bound=6e-3)
            cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5)
