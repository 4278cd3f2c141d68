"""Heads of odd widths in 16 bits: zero channels change nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moeut_compose.blocks.attention import attend
from moeut_compose.blocks.positions import NoPosition


@pytest.mark.parametrize("width", [5, 16, 41])
def test_odd_heads(width):
    parts = [torch.randn(2, 3, 9, width).bfloat16().requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    mixed = attend(parts[0], (parts[1], parts[2]), position=NoPosition(), start=0)
    expected = scaled_dot_product_attention(*exact, is_causal=True)
    assert mixed.shape == expected.shape
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.03)
    actual = torch.autograd.grad(mixed.float().sin().sum(), parts)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected.sin().sum(), exact), strict=True):
        assert gradient.shape == wanted.shape
        assert (gradient.double() - wanted).norm() < 0.02 * wanted.norm() + 1e-3
