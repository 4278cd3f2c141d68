"""Weight gradients of few experts and of many, with uses added up together or by separate programs."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

from tests.kernels.triton_cases import BOUNDS, DEVICE, DTYPES, INTERPRETED, TRITON

pytestmark = TRITON
SIDES = [(None, 2), (2, None), (2, 2)]
"""Which side is gathered by token, two slots each, and which lies in expert order."""


def make_use(
    counts: list[int], sides: tuple[int | None, int | None], height: int, width: int, dtype: torch.dtype
):
    """Rows of both sides, gates, and the plan of tokens that use experts `counts` times, in a random order."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = experts[torch.randperm(experts.numel())].view(-1, 1, 2)

    def rows(per: int | None, n_columns: int):
        return torch.randn(index.numel() // (per or 1), n_columns, device=DEVICE).to(dtype)

    plan = mk.plan(index.to(DEVICE), len(counts))
    return rows(sides[0], height), rows(sides[1], width), torch.rand(index.numel(), device=DEVICE), plan


def expected(uses, sides, gated: bool, n_experts: int):
    total = 0.0
    for left, right, gate, plan in uses:
        slots = plan.slots.long()
        a, b = (
            side.double() if per is None else side.double()[slots // per]
            for side, per in zip((left, right), sides, strict=True)
        )
        b = b * gate.double()[slots, None] if gated else b
        owner = plan.index.flatten()[slots]
        one_hot = torch.nn.functional.one_hot(owner.long(), n_experts).double()
        total = total + torch.einsum("re,rm,rn->emn", one_hot, a, b)
    return total


@pytest.mark.parametrize("fewest", [(1, 4), (2048, 2)], ids=["together", "apart"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "n_uses"),
    [
        ([210, 0, 3, 87, 0], 3),  # one with most rows, some without, in between and at the end
        ([0, 0, 400], 1),
        ([50, 50, 50, 50], 2),
        ([1, 1], 1),
        ([0, 0], 2),
    ],
)
def test_sums_of_outer_products(cases, monkeypatch, counts, n_uses, dtype, sides, fewest):
    from moeut_kernels import triton_gradients

    monkeypatch.setattr(triton_gradients, "FEWEST_PROGRAMS", fewest[0])
    monkeypatch.setattr(triton_gradients, "FEWEST_TOGETHER", fewest[1])
    uses = [
        make_use([counts[i - use] for i in range(len(counts))], sides, 37, 21, dtype) for use in range(n_uses)
    ]
    gated = n_uses == 1
    out = [torch.full((len(counts), 37, 21), float("nan"), device=DEVICE) for _ in range(2)]
    for result in out:
        triton_gradients.weight_gradient(
            [use[0] for use in uses], [use[1] for use in uses],
            [use[3].slots for use in uses], [use[3].offsets for use in uses],
            per_left=sides[0], per_right=sides[1], out=result, gate=uses[0][2] if gated else None,
        )  # fmt: skip
    assert torch.equal(*out)
    wanted = expected(uses, sides, gated, len(counts))
    assert cases.error(out[0].cpu(), wanted.cpu()) < 2 * BOUNDS[dtype] if wanted.any() else not out[0].any()
