"""The chunked loss is the plain loss, gradients included."""

import pytest
import torch
from torch.nn import functional as F

from moeut_compose.blocks.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_equals_the_plain_loss(chunk: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(chunk)
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((23, 6), (11, 6), (11,))
    )
    targets = torch.randint(0, 11, (23,), generator=generator)
    targets[4:9] = -100
    inputs = (x, weight, bias) if has_bias else (x, weight)
    plain = F.cross_entropy(F.linear(*inputs), targets)
    chunked = linear_cross_entropy(x, weight, bias if has_bias else None, targets, chunk=chunk)
    torch.testing.assert_close(chunked, plain)
    wanted = torch.autograd.grad(3.0 * plain, inputs)
    got = torch.autograd.grad(3.0 * chunked, inputs)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, weight, bias if has_bias else None, targets, chunk=chunk), plain
        )


def test_autocast_computes_logits_in_the_lower_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=generator, requires_grad=True)
    weight = torch.randn(32, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 32, (9,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, None, targets)
    loss.backward()
    plain = F.cross_entropy(F.linear(x, weight), targets)
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert not torch.equal(loss, plain)
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=2e-2)


def test_ignored_tokens_give_no_gradient_and_no_tokens_none() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 8, -100, 0])
    d_x, _ = torch.autograd.grad(linear_cross_entropy(x, weight, None, targets), (x, weight))
    assert [bool(row.any()) for row in d_x] == [True, False, True, True, False, True]
    none = linear_cross_entropy(x[:0], weight, None, targets[:0])
    assert none.isnan()
