"""What benchmarks measure against computes the same, and who does not is not timed."""

from __future__ import annotations

from dataclasses import replace

import moeut_kernels as mk
import pytest
import torch
from moeut_kernels.bench.compare import SHAPES, compare
from moeut_kernels.bench.loop import LOOPS, loop_over_experts
from moeut_kernels.bench.peers import CONTENDERS, Contender
from torch import Tensor

CPU = torch.device("cpu")
SMALL = replace(SHAPES["tiny"], n_tokens=24, d_model=8, n_experts=5, d_expert=8, top_k=2)


def results_and_gradients(compute, *operands: Tensor) -> tuple[Tensor, ...]:
    out = compute(*operands)
    return out, *torch.autograd.grad(out, operands, torch.ones_like(out).cumsum(0))


@pytest.mark.parametrize("form", LOOPS)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_loops_are_the_ops(form: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    wide = 6 if activation == "swiglu" else 3
    index = torch.rand(9, 1, 4, generator=generator).topk(2, -1)[1].clamp_max(2)  # expert 3 is empty
    grouped = torch.rand(9, 2, 4, generator=generator).topk(2, -1)[1]

    def feedforward(x, gate, up, down, b_up, b_down):
        plan = mk.plan(index, 4)
        return mk.expert_feedforward(x, up, down, plan, gate, activation=activation, b_up=b_up, b_down=b_down)

    def projections(x, gate, split, bias, merge):
        plan = mk.plan(grouped, 4)
        return mk.expert_merge(mk.expert_split(x, split, plan, gate, bias), merge, plan, gate)

    for compute, operands in (
        (feedforward, (random(9, 5), random(9, 1, 2), random(4, 5, wide), random(4, 3, 5), random(4, wide), random(4, 5))),
        (projections, (random(9, 5), random(9, 2, 2), random(4, 5, 3), random(4, 3), random(4, 3, 7))),
    ):  # fmt: skip
        expected = results_and_gradients(compute, *operands)
        with loop_over_experts(form):
            got = results_and_gradients(compute, *operands)
        torch.testing.assert_close(got, expected)
    assert mk.expert_feedforward.__module__ == "moeut_kernels.feedforward"


def test_loops_have_names() -> None:
    with pytest.raises(ValueError, match="form='spiral'"), loop_over_experts("spiral"):
        pass


def test_everybody_is_checked_and_timed_or_named() -> None:
    results = {result.implementation: result for result in compare(SMALL, device=CPU, repeats=3)}
    assert list(results) == [contender.name for contender in CONTENDERS]
    for name in ("moeut_kernels grouped_mm", "moeut_kernels torch", "loop", "loop_indexed"):
        result = results[name]
        assert result.status == "timed"
        assert result.largest_error < 1e-5
        low, high = result.forward_backward_spread_ms
        assert 0 < low <= result.forward_backward_ms <= high
        assert result.forward_ms > 0
    for name in ("scattermoe", "megablocks", "sonic-moe", "official moeut"):
        assert results[name].status in ("not installed", "needs a GPU")
        assert results[name].forward_backward_ms is None


def test_who_is_wrong_or_broken_is_not_timed() -> None:
    def halves(layer):
        return lambda x, gate, w_up, w_down: 0.5 * CONTENDERS[1].prepare(layer)(x, gate, w_up, w_down)

    def breaks(layer):
        raise TypeError("another version\nand more")

    strangers = [
        Contender("halves", halves),
        Contender("breaks", breaks),
        Contender("absent", halves, "no_such_thing"),
    ]
    wrong, broken, absent = compare(SMALL, device=CPU, repeats=1, contenders=strangers)
    assert (wrong.status, wrong.why) == ("wrong", "error above 1e-05")
    assert wrong.largest_error == pytest.approx(0.5, rel=1e-3)
    assert (broken.status, broken.why) == ("does not run", "TypeError: another version")
    assert (absent.status, absent.why) == ("not installed", "no package no_such_thing")
    assert wrong.forward_ms is broken.forward_ms is absent.forward_ms is None
