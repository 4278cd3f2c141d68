"""Choice of experts and gates against torch.topk, and padded logits."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch


@pytest.mark.parametrize(
    ("choose", "score"), [(mk.topk_sigmoid, torch.sigmoid), (mk.topk_softmax, lambda z: z.softmax(-1))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gates_of_the_largest_logits(choose, score, dtype):
    logits = torch.randn(6, 2, 16, dtype=torch.float64).to(dtype).requires_grad_()
    index, gate = choose(logits, 3, n_experts=11)
    exact = logits.detach().double()[..., :11].requires_grad_()
    values, expected = exact.topk(3, -1)
    assert torch.equal(logits.detach().gather(-1, index), logits.detach().gather(-1, expected))
    assert gate.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    weights = torch.randn(gate.shape, dtype=torch.float64)
    (gate.double() * weights).sum().backward()
    (score(values) * weights).sum().backward()
    assert logits.grad[..., 11:].abs().max() == 0
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(logits.grad[..., :11].double(), exact.grad, rtol=bound, atol=bound)


def test_top_k_bounds():
    with pytest.raises(ValueError, match="top_k=4"):
        mk.topk_sigmoid(torch.zeros(2, 8), 4, n_experts=3)


def test_padded_logits_on_cpu_are_the_plain_product():
    x, weight = torch.randn(5, 4), torch.randn(7, 4)
    assert torch.equal(mk.padded_logits(x, weight), x @ weight.t())


@pytest.mark.parametrize("choose", [mk.topk_sigmoid, mk.topk_softmax])
def test_no_tokens_and_strided_logits(choose):
    index, gate = choose(torch.zeros(0, 2, 5, requires_grad=True), 3)
    assert index.shape == gate.shape == (0, 2, 3)
    gate.sum().backward()
    logits = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(choose(logits.mT.contiguous().mT, 3), choose(logits, 3), strict=True):
        assert torch.equal(got, expected)


def test_usage_is_the_softmax_summed_over_tokens():
    logits = torch.randn(2, 7, 3, 6, dtype=torch.float64, requires_grad=True)
    index, gate, usage = mk.topk_sigmoid_usage(logits, 2, 5)
    for got, expected in zip((index, gate), mk.topk_sigmoid(logits, 2, 5), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(usage, logits[..., :5].softmax(-1).sum(1))
    with pytest.raises(ValueError, match="must be"):
        mk.topk_sigmoid_usage(logits[0], 2)
