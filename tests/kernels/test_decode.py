"""Kernels for a few tokens against their definitions in float64.

On a GPU in float32, bfloat16 and float16; without one in Triton's interpreter, in a process of their own, see
`test_interpreter.py`.
"""

import moeut_kernels as mk
import pytest
import torch
from moeut_kernels import decode, sampling

from tests.kernels.triton_cases import DEVICE, DTYPES, INTERPRETED

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
FEW_AND_MANY = [2, 19] if INTERPRETED else [1, 3, 9, 64, 100]


@pytest.fixture(autouse=True)
def _fresh(nan_filled_empty):
    torch.manual_seed(5)


def both(function, *operands, **settings):
    """What Triton and the definition make of the same operands; the definition in float64."""

    def exact(operand):
        if isinstance(operand, torch.Tensor):
            return operand.double().cpu() if operand.is_floating_point() else operand.cpu()
        if isinstance(operand, tuple) and operand:
            kind = type(operand)
            parts = [exact(part) for part in operand]
            return kind(*parts) if hasattr(operand, "_fields") else tuple(parts)
        return operand

    exact_operands = [exact(operand) for operand in operands]
    with mk.use_backend("triton"):
        actual = function(*operands, **settings)
    with mk.use_backend("torch"):
        return actual, function(*exact_operands, **settings)


def check(actual, expected, dtype, rounds=1):
    actual, expected = actual.double().cpu(), expected.double()
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= BOUNDS[dtype] * rounds * expected.norm()


def random(*shape, dtype=torch.float32):
    return (torch.randn(*shape, dtype=torch.float32) / shape[-2 if len(shape) > 1 else -1] ** 0.5).to(
        DEVICE, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", FEW_AND_MANY)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_and_product(n_tokens: int, kind: str, dtype: torch.dtype) -> None:
    d_model, n_rows = 40, 23
    bias = random(d_model) if kind == "layer" else None
    norm = decode.Norm(kind, 1 + random(d_model), bias, 1e-5)
    head_bias = random(n_rows, dtype=dtype) if kind == "rms" else None
    weight = random(n_rows, d_model, dtype=dtype)
    pending = None if kind == "rms" else random(3, n_tokens, d_model)
    actual, expected = both(decode.norm_project, random(n_tokens, d_model), pending, norm, weight, head_bias)
    for name, bound in (("total", torch.float32), ("data", dtype), ("normed", dtype), ("product", dtype)):
        check(getattr(actual, name), getattr(expected, name), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", FEW_AND_MANY)
@pytest.mark.parametrize(("n_experts", "top_k"), [(5, 2), (1, 1)])
def test_values(n_tokens: int, n_experts: int, top_k: int, dtype: torch.dtype) -> None:
    d_model, n_heads, d_head = 40, 3, 20
    logits = (
        torch.randn(n_tokens, n_heads * n_experts + 7).to(DEVICE)[:, 7:].unflatten(1, (n_heads, n_experts))
    )
    x = random(n_tokens, d_model, dtype=dtype)
    weight = random(n_heads * n_experts, d_model, d_head, dtype=dtype)
    actual, expected = both(decode.expert_values, x, logits, weight, top_k)
    check(actual.sum(0), expected.sum(0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", FEW_AND_MANY)
@pytest.mark.parametrize("top_k", [0, 2])
def test_outputs(n_tokens: int, top_k: int, dtype: torch.dtype) -> None:
    n_slices, n_heads, d_head, d_model, n_experts = 3, 2, 20, 40, 5 if top_k else 1
    attended = decode.Attended(
        random(n_slices, n_tokens, n_heads, d_head),
        torch.randn(n_slices, n_tokens, n_heads).to(DEVICE),
        1 + torch.rand(n_slices, n_tokens, n_heads).to(DEVICE),
    )
    attended.tops[1:, 0] = float("-inf")  # slices without anything to see
    attended.sums[1:, 0], attended.masses[1:, 0] = 0, 0
    logits = torch.randn(n_tokens, n_heads, n_experts).to(DEVICE) if top_k else None
    weight = random(n_heads * n_experts, d_head, d_model, dtype=dtype)
    actual, expected = both(decode.expert_outputs, attended, logits, weight, top_k)
    check(actual.sum(0), expected.sum(0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [0, 4])
@pytest.mark.parametrize(
    ("n_tokens", "room"), [(2, 128), (1, 160)] if INTERPRETED else [(2, 128), (4, 300), (1, 1100), (64, 512)]
)
def test_attention(n_tokens: int, room: int, half: int, dtype: torch.dtype) -> None:
    n_heads, d_head, n_parts = 2, 20, 3
    memory = tuple(random(n_tokens, n_heads, room, d_head, dtype=dtype) for _ in range(2))
    position = torch.randint(room, (n_tokens,)).to(DEVICE)
    position[0] = room - 1
    if n_tokens > 1:
        position[1] = 0
    angles = torch.rand(room, max(half, 1)).to(DEVICE)
    rope = (angles.cos(), angles.sin()) if half else None
    columns = torch.randn(n_tokens, 2 * n_heads * d_head + 5).to(DEVICE)
    query, key = (
        columns[:, at : at + n_heads * d_head].unflatten(1, (n_heads, d_head))
        for at in (5, 5 + n_heads * d_head)
    )
    exact = tuple(part.double().cpu() for part in memory)
    value = torch.randn(n_parts, n_tokens, n_heads, d_head).to(DEVICE)
    with mk.use_backend("triton"):
        actual = decode.attend(query, key, value, memory, position, rope)
    with mk.use_backend("torch"):
        expected = decode.attend(
            query.double().cpu(),
            key.double().cpu(),
            value.double().cpu(),
            exact,
            position.cpu(),
            None if rope is None else tuple(part.double().cpu() for part in rope),
        )
    assert actual.sums.shape[0] > 1
    check(decode.merged(actual), decode.merged(expected), dtype)
    for written, wanted in zip(memory, exact, strict=True):
        check(written, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", FEW_AND_MANY)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_feedforward(n_tokens: int, activation: str, dtype: torch.dtype) -> None:
    d_model, n_experts, d_expert, top_k = 40, 19, 20, 3
    width = d_expert * (2 if activation == "swiglu" else 1)
    logits = torch.randn(n_tokens, n_experts + 2).to(DEVICE)[:, 2:]
    x = random(n_tokens, d_model, dtype=dtype)
    up, down = (
        random(n_experts, d_model, width, dtype=dtype),
        random(n_experts, d_expert, d_model, dtype=dtype),
    )
    actual, expected = both(decode.expert_feedforward, x, logits, up, down, top_k, activation)
    check(actual.sum(0), expected.sum(0), dtype)


@pytest.mark.parametrize("activation", ["gelu", "silu", "geglu"])
def test_other_activations(activation: str) -> None:
    width = 32 if activation == "geglu" else 16
    for n_tokens in (2, 11):
        x, logits = random(n_tokens, 16), torch.randn(n_tokens, 6).to(DEVICE)
        up, down = random(6, 16, width), random(6, 16, 16)
        actual, expected = both(decode.expert_feedforward, x, logits, up, down, 2, activation)
        check(actual.sum(0), expected.sum(0), torch.float32)


def test_equal_logits_choose_the_lowest_experts() -> None:
    for n_tokens in (1, 9):
        x, logits = random(n_tokens, 16), torch.zeros(n_tokens, 8).to(DEVICE)
        up, down = random(8, 16, 16), random(8, 16, 16)
        actual, _ = both(decode.expert_feedforward, x, logits, up, down, 2, "relu")
        with mk.use_backend("torch"):
            apart = torch.arange(8, 0, -1.0).expand(n_tokens, 8) * 1e-6
            expected = decode.expert_feedforward(x.cpu(), apart, up.cpu(), down.cpu(), 2, "relu")
        torch.testing.assert_close(actual.sum(0).cpu(), expected.sum(0), rtol=1e-4, atol=1e-4)


def draw(logits, seeds, n=1, seen=None, **settings):
    n_rows = logits.shape[0]
    choice = sampling.Choice(logits.device, **settings)
    position = torch.zeros(n_rows, dtype=torch.int64, device=logits.device)
    tokens, written = (
        torch.zeros_like(position),
        torch.zeros(n_rows, n + 1, dtype=torch.int64, device=logits.device),
    )
    for _ in range(n):
        sampling.choose_tokens(
            logits, choice, position=position, tokens=tokens, written=written, seeds=seeds, seen=seen
        )
    assert position.tolist() == [n] * n_rows
    assert tokens.tolist() == written[:, -1].tolist()
    return written[:, 1:]


@pytest.mark.parametrize("kind", ["triton", "torch"])
@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0}, {4}),
        ({"top_k": 2}, {3, 4}),
        ({"top_p": 0.5}, {4}),
        ({"top_p": 0.8}, {3, 4}),
        ({"min_p": 0.2}, {2, 3, 4}),
        ({"penalty": 100.0, "temperature": 0}, {3}),
        ({"top_k": 3, "top_p": 0.95, "min_p": 0.3}, {3, 4}),
    ],
)
def test_only_what_is_left_is_drawn(kind: str, settings: dict, left: set) -> None:
    share = torch.tensor(
        [0.03, 0.05, 0.12, 0.28, 0.52]
    )  # over these shares everything can be worked out by hand
    quick = kind == "triton" and INTERPRETED
    n_rows = 4 if quick else 40
    logits = (share.log() + 3).expand(n_rows, 5).contiguous().to(DEVICE)
    seen = None
    if "penalty" in settings:
        seen = torch.zeros(n_rows, 5, dtype=torch.int8, device=DEVICE)
        seen[:, 4] = 1
    with mk.use_backend(kind):
        n = 1 if settings.get("temperature") == 0 else 3 if quick else 12
        drawn = set(
            draw(logits, torch.arange(n_rows, device=DEVICE), n, seen=seen, **settings).flatten().tolist()
        )
    assert drawn <= left if quick else drawn == left
    if seen is not None:
        assert seen.sum() == 2 * n_rows


@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_draws_follow_the_distribution(kind: str) -> None:
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])
    n_rows, n = (50, 3) if INTERPRETED else (2000, 10)
    logits = share.log().expand(n_rows, 4).contiguous().to(DEVICE)
    with mk.use_backend(kind):
        drawn = draw(logits, torch.arange(n_rows, device=DEVICE) * 7, n).cpu()
    seen = torch.bincount(drawn.flatten(), minlength=4) / (n_rows * n)
    assert (seen - share).abs().max() < 4 * 0.5 / (n_rows * n) ** 0.5


@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_a_draw_belongs_to_its_seed_and_position(kind: str) -> None:
    logits = torch.randn(3, 50).to(DEVICE)
    logits[2] = logits[0]
    seeds = torch.tensor([4, 5, 4], device=DEVICE)
    with mk.use_backend(kind):
        n = 6 if INTERPRETED else 20
        together = draw(logits, seeds, n)
        assert torch.equal(together[0], together[2])
        assert torch.equal(together[1:2], draw(logits[1:2].contiguous(), seeds[1:2], n))
        assert not torch.equal(together[0], draw(logits[:1].contiguous(), seeds[1:2], n)[0])
        assert len(set(together[0].tolist())) > 2
