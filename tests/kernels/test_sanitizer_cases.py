"""Every Triton kernel once, forward and backward, at shapes that end inside a tile: what `sanitize.py` looks at.

Small, because compute-sanitizer makes kernels up to a hundred times slower; without CUDA graphs and compilation, because
it runs with an allocator that does not cache. Memory that nobody writes holds NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import moeut_kernels as mk
import pytest
import torch
from moeut_kernels import decode, sampling

from tests.kernels.triton_cases import BOUNDS, DEVICE, HALF, INTERPRETED

SOURCES = Path(mk.__file__).parent.glob("triton_*.py")
PLAN = {"triton_routing._count", "triton_routing._place", "triton_routing._cut"}
ROWS = PLAN | {"triton_rows._grouped_rows", "triton_gradients._weight_gradient", "triton_sums._gather_sum"}
FEEDFORWARD = ROWS | {"triton_rows._walk", "triton_feedforward._backward_hidden"}
BIASES = {"triton_sums._segment_sum", "triton_sums._row_dots"}
PAIRS = PLAN | {"triton_pairs._pair_narrow", "triton_pairs._pair_wide", "triton_gradients._weight_gradient"}
DECODE, ATTENTION, EXPERTS = "triton_decode.", "triton_decode_attention.", "triton_decode_feedforward."


def op(name: str, dtype: torch.dtype = HALF, **shape: object) -> Callable:
    """An op, forward and backward, against its definition."""

    def run(cases) -> None:
        case = cases.make(name, **shape)
        cases.compare(case, dtype=dtype, device=DEVICE, bound=BOUNDS[dtype])

    return run


def deferred(cases) -> None:
    """Gradients of two uses at once, from padded copies."""
    w_up, w_down = (draw(3, *sides).requires_grad_() for sides in ((21, 10), (10, 37)))
    casts = mk.cast_weights(w_up, w_down, dtype=HALF, padded=True)
    total = torch.zeros((), device=DEVICE)
    for ticket in mk.feedforward_tickets(w_up, w_down, 2, casts=casts, n_tokens=70, top_k=2):
        index = torch.rand(70, 1, 3).topk(2, -1)[1].to(DEVICE)
        gate = torch.rand(70, 1, 2).to(DEVICE)
        x = draw(70, 21, dtype=HALF)
        out = mk.expert_feedforward(x, w_up, w_down, mk.plan(index, 3), gate, casts=casts, tickets=ticket)
        total = total + out.float().sum()
    total.backward()
    finite(w_up.grad, w_down.grad)


def chosen(cases) -> None:
    """Top-k, with the use of experts and without, of padded logits; and the backward."""
    logits = draw(7, 2, 40).requires_grad_()
    _, gate = mk.topk_softmax(logits, 3, n_experts=37)
    gate.square().sum().backward()
    finite(gate, logits.grad)
    logits = draw(3, 21, 2, 40, dtype=HALF).requires_grad_()
    _, gate, usage = mk.topk_sigmoid_usage(logits, 3, n_experts=37)
    (gate.square().sum() + usage.square().sum()).backward()
    finite(gate, usage, logits.grad)


def fanned(cases) -> None:
    """Two norms of a residual stream: parts to add up, rows that come back in order and listed."""
    weight, x = draw(37).requires_grad_(), draw(9, 37).requires_grad_()
    with torch.autocast(DEVICE, HALF):
        fan = mk.norm_fan(x, weight, eps=1e-5, shares=mk.ShareShape(18, 37, listed=False))
        last = mk.norm_fan(
            fan.residual,
            weight,
            weight,
            eps=1e-5,
            addend=draw(9, 3, 37, dtype=HALF),
            shares=mk.ShareShape(36, 48, listed=True),
        )
    position = torch.randperm(36).to(DEVICE, torch.int32).view(torch.float32)
    torch.autograd.backward(
        [fan.normed, fan.shares.rows, last.normed, last.residual, *last.shares],
        [
            fan.normed.detach(),
            draw(18, 37, dtype=HALF),
            last.normed.detach(),
            x.detach(),
            draw(36, 48, dtype=HALF),
            position,
        ],
    )
    finite(fan.normed, last.residual, last.data, x.grad, weight.grad)


def normed(n_tokens: int) -> Callable:
    def run(cases) -> None:
        norm = decode.Norm("layer", draw(40), draw(40), 1e-5)
        x, pending, weight, bias = (
            draw(n_tokens, 40),
            draw(3, n_tokens, 40),
            draw(23, 40, dtype=HALF),
            draw(23),
        )
        finite(*decode.norm_project(x, pending, norm, weight, bias))

    return run


def attended(n_tokens: int) -> Callable:
    """Values, attention with rotary positions at the end of a memory, outputs."""

    def run(cases) -> None:
        d_model, n_heads, d_head, n_experts, room = 40, 2, 20, 5, 300
        logits = draw(n_tokens, n_heads, n_experts)
        x = draw(n_tokens, d_model, dtype=HALF)
        values = decode.expert_values(x, logits, draw(n_heads * n_experts, d_model, d_head, dtype=HALF), 2)
        memory = (
            draw(n_tokens, n_heads, room, d_head, dtype=HALF),
            draw(n_tokens, n_heads, room, d_head, dtype=HALF),
        )
        position = torch.randint(room, (n_tokens,)).to(DEVICE)
        position[0] = room - 1
        query, key = draw(n_tokens, n_heads, d_head), draw(n_tokens, n_heads, d_head)
        found = decode.attend(query, key, values, memory, position, (draw(room, 4), draw(room, 4)))
        outputs = decode.expert_outputs(
            found, logits, draw(n_heads * n_experts, d_head, d_model, dtype=HALF), 2
        )
        finite(values, outputs)

    return run


def fed(n_tokens: int) -> Callable:
    def run(cases) -> None:
        up, down = draw(19, 40, 40, dtype=HALF), draw(19, 20, 40, dtype=HALF)
        x, logits = draw(n_tokens, 40, dtype=HALF), draw(n_tokens, 19)
        finite(decode.expert_feedforward(x, logits, up, down, 3, "swiglu"))

    return run


def sampled(cases) -> None:
    logits, seen = draw(3, 50), torch.zeros(3, 50, dtype=torch.int8, device=DEVICE)
    choice = sampling.Choice(logits.device, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, penalty=1.2)
    position = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tokens, written = torch.zeros_like(position), torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    seeds = torch.arange(3, device=DEVICE)
    sampling.choose_tokens(
        logits, choice, position=position, tokens=tokens, written=written, seeds=seeds, seen=seen
    )
    assert 0 <= tokens.min() <= tokens.max() < 50


EVEN = {"d_in": 128, "d_hidden": 128, "d_out": 128, "n_experts": 3}
ODD = {"d_in": 37, "d_hidden": 21, "d_out": 35, "n_experts": 4}
CASES: dict[str, tuple[Callable, set[str]]] = {
    "feedforward": (op("feedforward", n_tokens=150, **EVEN), FEEDFORWARD),
    "feedforward of odd sizes": (
        op("feedforward", n_tokens=75, top_k=3, biased=True, activation="swiglu", **ODD),
        FEEDFORWARD | BIASES,
    ),
    "feedforward in float32": (
        op("feedforward", torch.float32, n_tokens=75, top_k=3, **ODD),
        FEEDFORWARD - {"triton_rows._walk"} if not INTERPRETED else FEEDFORWARD,
    ),
    "feedforward of few rows": (
        op("feedforward", n_tokens=5, d_in=64, d_hidden=32, d_out=64, n_experts=7),
        FEEDFORWARD - {"triton_rows._walk"},
    ),
    "gradients of two uses": (deferred, FEEDFORWARD),
    **{
        f"{name} of {sizes} pairs": (op(name, n_tokens=75, n_groups=2, top_k=2, **shape), PAIRS)
        for name in ("split", "merge")
        for sizes, shape in (("even", EVEN), ("odd", ODD))
    },
    **{
        f"{name} by slots": (op(name, n_tokens=75, n_groups=2, top_k=3, biased=True, **ODD), ROWS | BIASES)
        for name in ("split", "merge")
    },
    "choice": (chosen, {"triton_router._choose", "triton_router._choose_backward", "triton_router._usage"}),
    "norm of a stream": (fanned, {"triton_norm._fan", "triton_norm._fan_backward"}),
    "norm, few tokens": (normed(2), {DECODE + "_norm_project_few"}),
    "norm, many tokens": (normed(19), {DECODE + "_sum_norm", DECODE + "_project"}),
    "attention, few tokens": (
        attended(2),
        {ATTENTION + "_values_few", ATTENTION + "_outputs_few", "triton_decode_memory._attend"},
    ),
    "attention, many tokens": (
        attended(19),
        {ATTENTION + "_values", ATTENTION + "_outputs", "triton_decode_memory._attend"},
    ),
    "experts, few tokens": (fed(2), {EXPERTS + "_up_few", EXPERTS + "_down_few"}),
    "experts, many tokens": (fed(19), {EXPERTS + "_gates", EXPERTS + "_up", EXPERTS + "_down"}),
    "sampling": (sampled, {"triton_sampling._choose"}),
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(DEVICE, dtype)


def finite(*tensors: torch.Tensor) -> None:
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if INTERPRETED else pytest.mark.gpu) for name in CASES]
)
def test_case(name: str, cases, on_triton, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import KernelInterface

    launched = set()
    start = KernelInterface.__getitem__

    def record(kernel, grid):
        launched.add(f"{kernel.fn.__module__.removeprefix('moeut_kernels.')}.{kernel.fn.__name__}")
        return start(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    torch.manual_seed(7)
    run, expected = CASES[name]
    run(cases)
    assert launched >= expected


def test_every_kernel_has_a_case() -> None:
    launches = {
        f"{source.stem}.{kernel}"
        for source in SOURCES
        for kernel in re.findall(r"^ +(_\w+)\[", source.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(launches) > 20
    missing = (
        launches - set().union(*(kernels for _, kernels in CASES.values())) - {"triton_tiles._overrides"}
    )
    assert not missing, f"compute-sanitizer never sees {missing}"
