"""Batched products on a CPU: tiles, every expert for every row, and when which of them is taken."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moeut_kernels import all_experts, grouping

from tests.kernels.op_names import OPS

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def tiles_of(counts: list[int], rows: int) -> tuple[grouping.Tiles, torch.Tensor]:
    """Tiles for experts with so many slots, in an order that was drawn, and the expert of every slot."""
    expert = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    plan = mk.plan(expert.view(-1, 1, 1), len(counts))
    return grouping.Tiles(plan.slots, plan.position, plan.offsets, rows), expert


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


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), op=st.sampled_from(OPS), routing=st.sampled_from(["random", "one", "few"]))
def test_drawn_shapes(cases, nan_filled_empty, data, op, routing):
    def size(low, high):
        return data.draw(st.integers(low, high))

    n_experts = size(1, 30)
    case = cases.make(
        op,
        n_tokens=size(0, 60),
        n_groups=1 if op == "feedforward" else size(1, 3),
        top_k=size(1, min(3, n_experts)),
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
    with mk.use_backend("bmm"):
        cases.compare(case, dtype=torch.float32, bound=1e-5)


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


class TestTileRows:
    @settings(max_examples=100, deadline=None)
    @given(counts=COUNTS)
    def test_bounds(self, counts: list[int]) -> None:
        rows = grouping._tile_rows(counts)
        if rows:
            assert max(-(-count // rows) for count in counts) <= grouping.MOST_RANKS
            assert rows * sum(-(-count // rows) for count in counts) <= grouping.MOST_FILLING * sum(counts)

    def test_even_experts_have_a_tile_each(self) -> None:
        assert grouping._tile_rows([40, 38, 40, 39]) == 40

    def test_uneven_experts_have_several(self) -> None:
        assert 10 <= grouping._tile_rows([80, 10, 10, 20]) <= 20

    def test_an_expert_that_takes_most_leaves_expert_order(self) -> None:
        counts = [6400] + [1] * 95
        assert grouping._tile_rows(counts) == 0
        tiles, _ = tiles_of([4, 1], 4)
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        order = grouping.in_order(tiles.slots, tiles.position, offsets, "bmm")
        assert type(order) is grouping.Grouping
        assert order.backend == "grouped_mm"


class TestChoice:
    @pytest.mark.parametrize(("per_thread", "expected"), [(1, "bmm"), (grouping.MOST_WORK + 1, "grouped_mm")])
    def test_by_the_work_of_an_expert(self, monkeypatch: pytest.MonkeyPatch, per_thread, expected) -> None:
        monkeypatch.setattr(grouping, "_n_threads", lambda: 6)
        assert mk.resolve(torch.empty(1), 6 * per_thread) == expected

    def test_unknown_work(self) -> None:
        assert mk.resolve(torch.empty(1)) == "grouped_mm"

    @pytest.mark.parametrize(
        ("dtype", "expected"), [(torch.bfloat16, "grouped_mm"), (torch.float64, "torch")]
    )
    def test_by_dtype(self, dtype: torch.dtype, expected: str) -> None:
        assert mk.resolve(torch.empty(1, dtype=dtype), 1) == expected
        with mk.use_backend("bmm"):
            assert mk.resolve(torch.empty(1, dtype=dtype), 1) == expected

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
