"""Choosing experts and grouping slots by expert, against PyTorch."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.triton_cases import DEVICE, DTYPES, TRITON

pytestmark = TRITON


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


@pytest.mark.parametrize("n_tokens", [300, 900])
def test_tile_tables_cover_every_row_once(n_tokens):
    """Where experts have many tiles, their earlier halves come first."""
    index = torch.randint(0, 5, (n_tokens, 1, 3))
    index[index == 2] = 4
    plan = mk.plan(index.to(DEVICE), 5)
    offsets, n_fine = plan.offsets.tolist(), index.numel() // 128 + 5
    fine = [tuple(entry) for entry in plan.tiles[:n_fine].tolist() if entry[0] >= 0]
    tiles = [[entry for entry in fine if entry[0] == expert] for expert in range(5)]
    early = [half for of_expert in tiles for half in of_expert[: -(-len(of_expert) // 2)]]
    assert fine == (
        early + [entry for entry in fine if entry not in early] if n_tokens > 800 else sorted(fine)
    )
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
@pytest.mark.parametrize(
    ("top_k", "n_experts", "width"), [(1, 1, 8), (3, 11, 16), (16, 37, 40), (5, 5, 5), (13, 97, 104)]
)
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


def test_topk_of_a_single_row():
    logits = torch.randn(11)
    index, gate = mk.topk_sigmoid(logits.to(DEVICE).requires_grad_(), 3)
    gate.sum().backward()
    assert torch.equal(index.cpu(), logits.topk(3).indices)


@pytest.mark.parametrize("used", ["both", "gates", "usage"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "n_experts", "width"), [(1, 37, 40), (3, 5, 5), (4, 2, 2), (1, 1, 8)])
def test_usage(dtype, used, n_heads, n_experts, width):
    """Gates and usage together: values and the one gradient, of logits that lie inside wider rows."""
    top_k, n_columns = min(2, n_experts), n_heads * width
    rows = torch.randn(3, 21, n_columns + 5, dtype=torch.float64).to(dtype)
    ours = rows.to(DEVICE).clone().requires_grad_()
    logits = ours[..., 2 : 2 + n_columns].unflatten(-1, (n_heads, width))
    index, gate, usage = mk.topk_sigmoid_usage(logits, top_k, n_experts)
    exact = rows.double().requires_grad_()
    z = exact[..., 2 : 2 + n_columns].unflatten(-1, (n_heads, width))[..., :n_experts]
    order = torch.argsort(z, dim=-1, descending=True, stable=True)[..., :top_k]
    assert torch.equal(index.cpu(), order)
    expected = {"gates": z.gather(-1, order).sigmoid(), "usage": z.softmax(-1).sum(1)}
    got = {"gates": gate, "usage": usage}
    total, wanted = 0.0, 0.0
    for name, value in expected.items():
        torch.testing.assert_close(got[name].detach().cpu().double(), value.detach(), rtol=1e-5, atol=1e-5)
        if used in ("both", name):
            cotangent = torch.randn(value.shape, dtype=torch.float64)
            total = total + (got[name] * cotangent.to(DEVICE)).sum()
            wanted = wanted + (value * cotangent).sum()
    total.backward()
    wanted.backward()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        ours.grad.cpu().double(), exact.grad, rtol=bound, atol=1e-6 if bound < 1e-4 else 1e-3
    )
