"""Every Triton kernel, forward and backward, against dense einsums in float64.

On a GPU these run in float32, bfloat16 and float16. Without one they run in Triton's interpreter, in a process of
their own, because the choice is made when Triton is imported: see `test_interpreter.py`.
"""

from __future__ import annotations

import os
import random

import moeut_kernels as mk
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(BOUNDS)
OPS = ["split", "merge", "feedforward"]


@pytest.fixture(autouse=True)
def _on_triton(nan_filled_empty):
    with mk.use_backend("triton"):
        yield


def check(cases, op, dtype, **kwargs):
    cases.compare(cases.make(op, **kwargs), dtype=dtype, device=DEVICE, bound=BOUNDS[dtype])


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


@pytest.mark.parametrize("op", OPS)
def test_float32_master_weights(cases, op):
    """Rows in half precision, weights in float32: gradients of the weights come in float32."""
    half = torch.float16 if INTERPRETED else torch.bfloat16
    case = cases.make(
        op, n_tokens=40, n_groups=1 if op == "feedforward" else 2, d_in=16, d_hidden=16, d_out=16
    )
    case.operands = {k: None if v is None else v.to(half).double() for k, v in case.operands.items()}
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    leaves["x"] = leaves["x"].detach().to(half).requires_grad_()
    cases.compare(case, dtype=torch.float32, device=DEVICE, bound=4e-3, leaves=leaves, cotangent_dtype=half)


@pytest.mark.parametrize("op", OPS)
def test_padded_copies_of_odd_widths(cases, op):
    """Copies are wider than their weights: results and gradients have the shapes of the weights."""
    half = torch.float16 if INTERPRETED else torch.bfloat16
    case = cases.make(
        op, n_tokens=40, n_groups=1 if op == "feedforward" else 2, d_in=21, d_hidden=10, d_out=37
    )
    plan = mk.plan(case.index.to(DEVICE), case.n_experts)
    case.operands = {k: None if v is None else v.to(half).double() for k, v in case.operands.items()}
    leaves = cases.leaves(case.operands, dtype=torch.float32, device=DEVICE)
    leaves["x"] = leaves["x"].detach().to(half).requires_grad_()
    weights = [leaves[name] for name in ("w_up", "w_down", "weight") if name in leaves]
    casts = mk.cast_weights(*weights, dtype=half, padded=True)
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
    half = torch.float16 if INTERPRETED else torch.bfloat16
    case = cases.make("feedforward", n_tokens=40, d_in=21, d_hidden=10, d_out=37)
    w_up, w_down = (
        case.operands[name].to(half).float().to(DEVICE).requires_grad_() for name in ("w_up", "w_down")
    )
    casts = mk.cast_weights(w_up, w_down, dtype=half, padded=True)
    tickets = mk.feedforward_tickets(w_up, w_down, 3, casts=casts, n_tokens=40, top_k=2)
    total, expected = 0.0, 0.0
    exact = [w.detach().double().cpu().requires_grad_() for w in (w_up, w_down)]
    for shift in range(3):
        x, gate = case.operands["x"].roll(shift, 0).to(half), case.operands["gate"].float()
        index = (case.index + shift) % 5
        cotangent = torch.randn(40, 37, dtype=torch.float64).to(half)
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


@pytest.mark.parametrize(
    ("n_experts", "shape"), [(1, (9, 1, 1)), (5, (33, 1, 3)), (40, (70, 4, 2)), (13, (1, 1, 4))]
)
def test_plan_equals_the_definition(n_experts, shape):
    index = torch.randint(0, n_experts, shape)
    ours = mk.plan(index.to(DEVICE), n_experts)
    with mk.use_backend("torch"):
        plain = mk.plan(index, n_experts)
    for name in ("slots", "position", "offsets"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(plain, name)), name


def test_tile_tables_cover_every_row_once():
    index = torch.randint(0, 5, (900, 1, 3))
    index[index == 2] = 4
    plan = mk.plan(index.to(DEVICE), 5)
    offsets, n_fine = plan.offsets.tolist(), index.numel() // 128 + 5
    for table, rows in ((plan.tiles[:n_fine], 128), (plan.tiles[n_fine:], 2048)):
        seen = torch.zeros(index.numel(), dtype=torch.int64)
        for expert, _, first, stop in table.tolist():
            if expert >= 0:
                assert stop == offsets[expert + 1]
                assert (first - offsets[expert]) % rows == 0
                seen[first : min(stop, first + rows)] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("choose", [mk.topk_sigmoid, mk.topk_softmax])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "n_experts", "width"), [(1, 1, 8), (3, 11, 16), (16, 37, 40), (5, 5, 5)])
def test_topk(choose, dtype, top_k, n_experts, width):
    """Same choice and gates as PyTorch, ties to the lower expert; gradients too."""
    logits = torch.randn(7, 2, width, dtype=torch.float64).to(dtype)
    ours = logits.to(DEVICE).clone().requires_grad_()
    index, gate = choose(ours, top_k, n_experts=n_experts)
    exact = logits.double().detach().clone().requires_grad_()
    order = torch.argsort(logits[..., :n_experts], dim=-1, descending=True, stable=True)[..., :top_k]
    chosen = exact.gather(-1, order)
    expected = chosen.sigmoid() if choose is mk.topk_sigmoid else chosen.softmax(-1)
    assert torch.equal(index.cpu(), order)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    cotangent = torch.randn(gate.shape, dtype=torch.float64)
    (gate * cotangent.to(DEVICE)).sum().backward()
    (expected * cotangent).sum().backward()
    assert ours.grad.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        ours.grad.cpu().double(), exact.grad, rtol=bound, atol=1e-6 if bound < 1e-4 else 1e-3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_what_is_no_number(dtype):
    """Whatever the logits are, the chosen experts exist and are distinct, and the row's gates say that it is broken."""
    logits = torch.randn(6, 1, 16).to(dtype)
    logits[0, 0, :11], logits[1, 0, 3], logits[2, 0, 4] = -float("nan"), float("nan"), -float("inf")
    ours = logits.to(DEVICE).requires_grad_()
    index, gate = mk.topk_sigmoid(ours, 9, n_experts=11)
    assert index.max() < 11
    assert all(len(set(row)) == 9 for row in index[:, 0].tolist())
    assert gate[0].isnan().all()
    assert gate[2:].isfinite().all()
    gate.sum().backward()  # the gradient of a sum is one number behind many places
    assert ours.grad[2:].isfinite().all()
    assert (ours.grad[..., 11:] == 0).all()


@pytest.mark.parametrize("columns", [slice(0, 11), slice(3, 14), slice(0, 16, 2)])
def test_topk_of_rows_that_do_not_touch(columns):
    """Logits are a slice of padded ones: their rows lie further apart than they are long."""
    padded = torch.randn(9, 1, 16).to(DEVICE)
    logits = padded[..., columns].reshape(9, 1, -1)
    index, gate = mk.topk_sigmoid(logits, 3)
    expected = logits.cpu().topk(3, dim=-1)
    assert torch.equal(index.cpu(), expected.indices)
    torch.testing.assert_close(gate.cpu(), expected.values.sigmoid())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow for sizes that fill real tiles")
@pytest.mark.parametrize("draw", range(20))
def test_drawn_shapes_fill_real_tiles(cases, draw):
    """Twenty shapes drawn anew each run; the message of a failure names the seed."""
    seed = random.SystemRandom().randrange(2**31)
    r = random.Random(seed)
    op, dtype = r.choice(OPS), r.choice([torch.float32, torch.bfloat16])
    n_experts = r.choice([1, 7, 40, 65])
    kwargs = {
        "n_tokens": r.choice([1, 130, 700]),
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


@pytest.mark.skipif(INTERPRETED, reason="needs the CUDA allocator and graphs")
class TestOnCuda:
    @pytest.mark.parametrize("op", OPS)
    def test_repeats_bit_for_bit(self, cases, op):
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
    def test_captures_in_a_graph(self, cases, op):
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
    def test_compiles_to_one_graph(self, cases, op):
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
    def test_plain_backends(self, cases, backend):
        with mk.use_backend(backend):
            for op in OPS:
                case = cases.make(
                    op, n_tokens=64, n_groups=1 if op == "feedforward" else 2, d_in=64, d_hidden=64, d_out=64
                )
                cases.compare(case, dtype=torch.bfloat16, device=DEVICE, bound=6e-3)
                cases.compare(case, dtype=torch.float32, device=DEVICE, bound=1e-5)
