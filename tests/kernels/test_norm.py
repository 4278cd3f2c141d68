"""The norm with what lies around it, against sum, norm and products apart, in float64; and what it refuses."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.norm_cases import gradients, make_layer, run_layer


@settings(max_examples=20, deadline=None)
@given(
    n_tokens=st.integers(1, 9), width=st.integers(2, 20), n_heads=st.integers(1, 3), top_k=st.integers(1, 3),
    center=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_layer_through_fans(n_tokens: int, width: int, n_heads: int, top_k: int, center: bool, seed: int):
    case = make_layer(n_tokens=n_tokens, width=width, n_heads=n_heads, top_k=top_k, seed=seed)
    with mk.use_backend("torch"):
        expected, found = (
            gradients(*case, fanned=fanned, center=center, dtype=torch.float64, device="cpu")
            for fanned in (False, True)
        )
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def stream(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(6, 10, dtype=dtype, requires_grad=True)


def test_reads_of_the_data_come_back_too():
    """What reads the residual hands back an ordinary gradient beside rows of experts."""
    x, weight = stream(), torch.randn(10, dtype=torch.float64)
    rows = torch.randn(12, 10, dtype=torch.float64)
    fan = mk.norm_fan(x, weight, eps=1e-5, addend=x.detach(), shares=mk.ShareShape(12, 10, listed=False))
    (fan.residual.sin().sum() + (fan.shares.rows * rows).sum()).backward()
    expected = (2 * x.detach()).cos() + rows.view(6, 2, 10).sum(1)
    torch.testing.assert_close(x.grad, expected)


def test_the_copy_takes_ordinary_gradients_under_autocast():
    x, weight = stream(torch.float32), torch.ones(10)
    with torch.autocast("cpu", torch.bfloat16):
        alone = mk.norm_fan(x, weight, eps=1e-5, addend=x.detach())
        beside = mk.norm_fan(
            x, weight, eps=1e-5, addend=x.detach(), shares=mk.ShareShape(6, 10, listed=False)
        )
    assert alone.data.dtype == alone.normed.dtype == torch.bfloat16 and alone.residual.dtype == torch.float32
    (2 * alone.data.float()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    x.grad = None
    (2 * beside.data.float() + 3 * beside.shares.rows.float()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 5.0))


def test_keeps_no_stream_under_autocast():
    """The backward reads what products keep anyway."""
    x, weight = stream(torch.float32), torch.ones(10, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu"),
    ):
        mk.norm_fan(x, weight, eps=1e-5, addend=x.detach())
    assert {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}


def test_opcheck():
    x, weight, bias = (
        stream(torch.float32),
        torch.randn(10, requires_grad=True),
        torch.randn(10, requires_grad=True),
    )
    addend = torch.randn(6, 3, 10, requires_grad=True)
    for arguments in (
        (x, None, None, weight, bias, 1e-5, True, torch.bfloat16, [12, 16, 1], "torch"),
        (x, None, addend, weight, None, 1e-5, False, torch.float32, [], "torch"),
        (
            x.detach().t().contiguous().t(),
            None,
            addend.double(),
            weight,
            None,
            1e-5,
            True,
            torch.bfloat16,
            [],
            "torch",
        ),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.moeut.norm_fan, arguments, test_utils=tests)


def test_opcheck_backward():
    x, weight = torch.randn(10, 6).t(), torch.randn(10)
    mean, scale, rows = torch.randn(6), torch.rand(6), torch.randn(12, 16)
    order = torch.randperm(12, dtype=torch.int32)
    for arguments in (
        (x, x, rows, order, x, weight, mean, scale, True, torch.float32, torch.bfloat16, "torch"),
        (None, None, rows, None, x, weight, mean, scale, True, torch.float32, None, "torch"),
        (x, x, None, None, x, weight, mean[:0], scale, False, torch.float32, None, "torch"),
    ):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.moeut.norm_fan_backward, arguments, test_utils=tests)


def test_no_tokens():
    x, weight = stream(torch.float32), torch.ones(10, requires_grad=True)
    none = x.detach()[:0].requires_grad_()
    fan = mk.norm_fan(none, weight, eps=1e-5, addend=none.detach(), shares=mk.ShareShape(0, 16, listed=False))
    torch.autograd.backward([fan.normed, fan.shares.rows], [fan.normed.detach(), torch.empty(0, 16)])
    assert none.grad.shape == (0, 10) and torch.equal(weight.grad, torch.zeros(10))


def test_compiles_to_one_graph():
    case = make_layer(n_tokens=6, width=12, n_heads=2)
    runs = run_layer, torch.compile(run_layer, fullgraph=True, backend="aot_eager")
    with mk.use_backend("torch"):
        eager, compiled = (
            gradients(*case, fanned=True, center=True, dtype=torch.float64, device="cpu", run=run)
            for run in runs
        )
    assert all(torch.equal(compiled[name], value) for name, value in eager.items())


def test_refuses_shapes_that_do_not_fit():
    x, weight = stream(), torch.ones(10)
    with pytest.raises(ValueError, match=r"x must be \[N, D\]"):
        mk.norm_fan(x[None], weight, eps=1e-5)
    with pytest.raises(ValueError, match=r"weight must be \(10,\), got \(9,\)"):
        mk.norm_fan(x, weight[:9], eps=1e-5)
    with pytest.raises(ValueError, match=r"bias must be"):
        mk.norm_fan(x, weight, weight[:9], eps=1e-5)
    for addend in (x[:5], x[:, :9], x[:, None, None], x[:, None][:, :0]):
        with pytest.raises(ValueError, match=r"addend must be \[N, D\] or \[N, H, D\]"):
            mk.norm_fan(x, weight, eps=1e-5, addend=addend)
    carried = mk.norm_fan(x, weight, eps=1e-5).residual
    assert isinstance(carried, mk.Carried)
    with pytest.raises(ValueError, match="addend is missing"):
        mk.norm_fan(carried, weight, eps=1e-5)


def test_pays_only_where_triton_trains():
    x = stream(torch.float32)
    assert not mk.fans(x)
    with mk.use_backend("triton"):
        assert mk.fans(x)
        assert not mk.fans(x.double())
        assert not mk.fans(torch.empty(1, 8193))
        with torch.no_grad():
            assert not mk.fans(x)
