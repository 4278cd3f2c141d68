"""The norm with what lies around it on Triton, and the rows that experts hand back to it, against float64."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.norm_cases import gradients, make_layer
from tests.kernels.triton_cases import BOUNDS, DEVICE, DTYPES, INTERPRETED, TRITON

pytestmark = TRITON


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("width", "n_heads", "top_k"), [(16, 2, 2), (37, 3, 2), (48, 2, 3), (20, 1, 1)])
def test_layer_through_fans(width: int, n_heads: int, top_k: int, center: bool):
    case = make_layer(n_tokens=21, width=width, n_heads=n_heads, top_k=top_k)
    with mk.use_backend("torch"):
        expected = gradients(*case, fanned=False, center=center, dtype=torch.float64, device=DEVICE)
    found = gradients(*case, fanned=True, center=center, dtype=torch.float32, device=DEVICE)
    for name, value in expected.items():
        assert error(found[name], value) <= 1e-5, name


WIDTHS = [16, 37] if INTERPRETED else [16, 412, 1024, 1536, 2560, 8192]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_one_fan(width: int, listed: bool, dtype: torch.dtype):
    """With three parts to add, and five rows a token that come back, wider than the stream."""
    n_tokens, n_rows = (9, 45) if INTERPRETED else (2100, 10500)
    x, weight, bias = draw(n_tokens, width), draw(width), draw(width)
    addend, d_normed, d_total = (
        draw(n_tokens, 3, width, dtype=dtype),
        draw(n_tokens, width, dtype=dtype),
        draw(n_tokens, width),
    )
    rows, position = draw(n_rows, width + 3, dtype=dtype), torch.randperm(n_rows)
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, addend, weight, bias)]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        fan = mk.norm_fan(
            leaves[0],
            *leaves[2:],
            eps=1e-5,
            addend=leaves[1],
            shares=mk.ShareShape(n_rows, width + 3, listed),
        )
    handed = [fan.shares.rows, fan.shares.position][: 1 + listed]
    back = [rows.to(DEVICE), position.int().to(DEVICE).view(torch.float32)][: 1 + listed]
    torch.autograd.backward(
        [fan.normed, fan.residual, *handed], [d_normed.to(DEVICE), d_total.to(DEVICE), *back]
    )
    exact = [t.double().requires_grad_() for t in (x, addend, weight, bias)]
    total = exact[0] + exact[1].sum(1)
    normed = torch.nn.functional.layer_norm(total, (width,), *exact[2:], 1e-5)
    shared = (rows[position] if listed else rows).double().view(n_tokens, 5, -1)[..., :width].sum(1)
    torch.autograd.backward([normed, total], [d_normed.double(), d_total.double() + shared])
    bound = BOUNDS[dtype]
    for name, found, expected in (
        ("normed", fan.normed, normed), ("data", fan.data, total), ("residual", fan.residual, total),
        *zip(("d_x", "d_addend", "d_weight", "d_bias"), (t.grad for t in leaves), (t.grad for t in exact), strict=True),
    ):  # fmt: skip
        assert error(found.cpu(), expected) <= bound, name


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def test_repeats_bit_for_bit():
    case = make_layer(n_tokens=40, width=32, n_heads=2)
    runs = [gradients(*case, fanned=True, center=True, dtype=DTYPES[-1], device=DEVICE) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_no_tokens():
    x, weight = (torch.ones(*shape, device=DEVICE, requires_grad=True) for shape in ((0, 16), (16,)))
    fan = mk.norm_fan(x, weight, eps=1e-5, addend=x.detach())
    (fan.normed.sum() + fan.residual.sum()).backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))
