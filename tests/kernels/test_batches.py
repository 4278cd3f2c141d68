"""Batched products on a CPU: tiles, every expert for every row, and when which of them is taken."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moeut_kernels import all_experts, layout

from tests.kernels.op_names import OPS

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def tiles_of(counts: list[int], rows: int) -> tuple[layout.Tiles, torch.Tensor]:
    """Tiles for experts with so many slots, in an order that was drawn, and the expert of every slot."""
    expert = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    plan = mk.plan(expert.view(-1, 1, 1), len(counts))
    return layout.Tiles(plan.slots, plan.position, plan.offsets, rows), expert


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, rows=st.integers(1, 45))
def test_every_slot_has_a_row_in_a_tile_of_its_expert(counts: list[int], rows: int) -> None:
    tiles, expert = tiles_of(counts, rows)
    assert torch.equal(tiles.slots[tiles.position], torch.arange(sum(counts), dtype=torch.int32))
    of_row = expert[tiles.slots].view(-1, rows)
    assert (of_row == of_row[:, :1]).all()
    assert of_row.shape[0] == sum(-(-count // rows) for count in counts)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, rows=st.integers(1, 45))
def test_rows_that_are_no_slots_have_no_gate(counts: list[int], rows: int) -> None:
    tiles, _ = tiles_of(counts, rows)
    for gate in (None, torch.rand(sum(counts), 1, 1) + 0.5):
        gates = tiles.gates(gate).flatten().float()
        expected = torch.zeros_like(gates)
        expected[tiles.position] = 1.0 if gate is None else gate.flatten()
        assert torch.equal(gates, expected)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, rows=st.integers(1, 45))
def test_what_passes_between_passes_is_in_expert_order(counts: list[int], rows: int) -> None:
    tiles, _ = tiles_of(counts, rows)
    ordered = torch.randn(sum(counts), 3)
    spread = tiles.spread(ordered)
    assert torch.equal(tiles.packed(spread), ordered)
    assert torch.equal(spread[tiles.is_slot.flatten()].sort(0)[0], ordered.sort(0)[0])


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit(cases, op):
    case = cases.make(op, n_tokens=200, n_groups=1 if op == "feedforward" else 2, n_experts=12, biased=True)
    results = []
    for _ in range(2):
        leaves = cases.leaves(case.operands, dtype=torch.float32)
        with mk.use_backend("bmm"):
            out = case.run(leaves)
        out.sin().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n_experts", [4, 20])
def test_copies_of_masters_in_another_dtype(cases, op, n_experts):
    """Float32 rows and padded copies, masters of 16 bits: gradients have the masters' shapes and dtype."""
    case = cases.make(op, n_tokens=20, n_groups=1 if op == "feedforward" else 2, n_experts=n_experts)
    results = []
    for backend in ("torch", "bmm"):
        leaves = cases.leaves(case.operands, dtype=torch.float32)
        names = ["w_up", "w_down"] if op == "feedforward" else ["weight"]
        masters = [leaves[name].detach().bfloat16().requires_grad_() for name in names]
        copies = mk.cast_weights(*masters, dtype=torch.float32, padded=True)
        plan = mk.plan(case.index, n_experts)
        with mk.use_backend(backend):
            if op == "feedforward":
                out = mk.expert_feedforward(leaves["x"], *masters, plan, leaves["gate"], casts=copies)
            else:
                product = mk.expert_split if op == "split" else mk.expert_merge
                out = product(leaves["x"], *masters, plan, leaves["gate"], cast=copies[0])
        out.sin().sum().backward()
        assert all(m.grad.dtype == torch.bfloat16 and m.grad.shape == m.shape for m in masters)
        results.append([out.detach(), leaves["x"].grad, *(master.grad for master in masters)])
    assert all(cases.error(a.float(), b.float()) < 1e-2 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n_experts", [4, 20])
def test_a_backward_inside_autocast_stays_exact(cases, op, n_experts):
    case = cases.make(
        op, n_tokens=90, n_groups=1 if op == "feedforward" else 2, n_experts=n_experts, routing="one"
    )
    results = []
    for inside in (False, True):
        leaves = cases.leaves(case.operands, dtype=torch.float32)
        with mk.use_backend("bmm"):
            out = case.run(leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.sum().backward()
        results.append([leaf.grad for leaf in leaves.values() if leaf is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestTileRows:
    @settings(max_examples=100, deadline=None)
    @given(counts=COUNTS)
    def test_bounds(self, counts: list[int]) -> None:
        rows = layout._tile_rows(counts)
        if rows:
            assert max(-(-count // rows) for count in counts) <= layout.MOST_RANKS
            assert rows * sum(-(-count // rows) for count in counts) <= layout.MOST_FILLING * sum(counts)

    def test_even_experts_have_a_tile_each(self) -> None:
        assert layout._tile_rows([40, 38, 40, 39]) == 40

    def test_uneven_experts_have_several(self) -> None:
        assert 10 <= layout._tile_rows([80, 10, 10, 20]) <= 20

    def test_an_expert_that_takes_most_leaves_expert_order(self) -> None:
        counts = [6400] + [1] * 95
        assert layout._tile_rows(counts) == 0
        tiles, _ = tiles_of([4, 1], 4)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        chosen = layout.lay_out(tiles.slots, tiles.position, offsets, "bmm")
        assert type(chosen) is layout.Layout
        assert chosen.backend == "grouped_mm"


class TestChoice:
    @pytest.fixture(autouse=True)
    def six_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(6)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize(
        ("rows", "elements", "expected"),
        [
            (16, 4096, "bmm"),
            (15, 4096, "grouped_mm"),
            (1536, 4096, "bmm"),
            (1537, 4096, "grouped_mm"),
            (16, 2**16, "bmm"),
            (16, 2**16 + 1, "grouped_mm"),
        ],
    )
    def test_by_rows_and_matrices(self, rows: int, elements: int, expected: str) -> None:
        assert mk.resolve(torch.empty(1), (rows, elements)) == expected

    @pytest.mark.parametrize(("n_threads", "expected"), [(3, "grouped_mm"), (4, "bmm")])
    def test_by_threads(self, n_threads: int, expected: str) -> None:
        torch.set_num_threads(n_threads)
        assert mk.resolve(torch.empty(1), (16, 16)) == expected

    def test_unknown_work(self) -> None:
        assert mk.resolve(torch.empty(1)) == "grouped_mm"

    @pytest.mark.parametrize(
        ("dtype", "expected"), [(torch.bfloat16, "grouped_mm"), (torch.float64, "torch")]
    )
    def test_by_dtype(self, dtype: torch.dtype, expected: str) -> None:
        assert mk.resolve(torch.empty(1, dtype=dtype), (16, 16)) == expected
        with mk.use_backend("bmm"):
            assert mk.resolve(torch.empty(1, dtype=dtype), (16, 16)) == expected

    def test_exported_programs_take_any_number_of_rows(self, cases) -> None:
        case = cases.make("feedforward", n_tokens=64, d_in=8, d_hidden=4, d_out=8)
        o = {name: None if value is None else value.float() for name, value in case.operands.items()}

        class Layer(torch.nn.Module):
            def forward(self, x, index, gate):
                return mk.expert_feedforward(x, o["w_up"], o["w_down"], mk.plan(index, 5), gate)

        example = (o["x"], case.index, o["gate"])
        assert mk.resolve(o["x"], (64 * 2 // 5, 32)) == "bmm"
        n = torch.export.Dim("n", min=2)
        program = torch.export.export(Layer(), example, dynamic_shapes=({0: n},) * 3).module()
        few = tuple(tensor[:7] for tensor in example)
        assert cases.error(program(*few), Layer()(*few)) < 1e-6

    @pytest.mark.parametrize("op", ["split", "merge"])
    @pytest.mark.parametrize(("n_experts", "expected"), [(8, True), (9, False)])
    def test_all_experts_where_a_token_takes_half_of_them(self, cases, monkeypatch, op, n_experts, expected):
        taken = []
        forward = all_experts.forward
        monkeypatch.setattr(all_experts, "forward", lambda *a: taken.append(True) or forward(*a))
        case = cases.make(op, n_groups=2, top_k=2, n_experts=n_experts)
        with mk.use_backend("bmm"):
            case.run(cases.leaves(case.operands, dtype=torch.float32))
        assert bool(taken) is expected
