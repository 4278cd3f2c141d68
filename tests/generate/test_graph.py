"""The decoder for GPUs, here on a CPU and in float32: packed models and modules write what the eager decoder writes."""

import pytest
import torch
from moeut_kernels import use_backend

from moeut_compose.build import build_model
from moeut_compose.generate.decoding import EagerDecoder
from moeut_compose.generate.fused import packed
from moeut_compose.generate.graph import GraphDecoder
from moeut_compose.generate.sampling import Sampling
from moeut_compose.spec.io import load_spec

SMALL = ["vocab_size=97", "d_model=32", "context_length=64"]
COVERED = {
    "MoEUT": ("moeut_tiny", []),
    "MoEUT AABB, pre": ("moeut_tiny", ["stages.0.pattern=AABB", "norm.placement=pre"]),
    "dense": ("dense_tiny", []),
    "dense, swiglu": ("dense_tiny", ["stages.0.layers.0.feedforward.activation=swiglu"]),
    "sigma-MoE, no positions": ("sigma_moe_tiny", ["position={kind: none}"]),
    "SwitchHead": ("switchhead_tiny", []),
}
NOT_COVERED = {
    "SUT": ("sut_tiny", []),
    "MoEUT with ACT": ("moeut_act_tiny", []),
    "Universal Transformer": ("universal_transformer_tiny", []),
    "post norm": ("moeut_tiny", ["norm.placement=post"]),
    "relaxed recursion": ("relaxed_recursive_tiny", []),
    "relative positions": ("dense_tiny", ["position={kind: relative, max_distance: 8}"]),
}
PROMPTS = [[5, 9, 13, 2], [7], [1, 2, 3, 4, 5, 6, 7]]


def small(name: str, overrides: list[str], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = build_model(load_spec(name, SMALL + overrides), dtype=dtype, seed=1).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # leave no zero initialisation that would hide a fault
            parameter.add_(torch.randn(parameter.shape, dtype=dtype) * 0.05)
    return model


def write(decoder, prompts: list[list[int]], n: int, sampling: Sampling, seeds=None) -> list[list[int]]:
    decoder.begin(prompts, max_new_tokens=n, sampling=sampling, seeds=seeds or range(len(prompts)))
    rows = [[] for _ in prompts]
    while len(rows[0]) < n:
        for row, piece in zip(rows, decoder.more(), strict=True):
            row.extend(piece)
    return [row[:n] for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("name", COVERED)
def test_a_packed_model_gives_the_logits_of_its_modules(name: str) -> None:
    model = small(*COVERED[name])
    fused = packed(model, torch.float32)
    assert fused is not None
    fused.make_room(32)
    ids = torch.randint(97, (3, 9))
    lengths = torch.tensor([4, 8, 1])
    cache = model(ids[:, :8], cache=_empty()).cache.with_room(lengths, 32)
    again = tuple((key.clone(), value.clone()) for key, value in cache.memories)
    tokens = ids[:, 8]
    wanted = model(tokens[:, None], cache=cache)
    with use_backend("torch"):
        logits = fused.step(tokens, lengths, again)
    torch.testing.assert_close(logits, wanted.logits[:, 0], rtol=2e-4, atol=2e-4)
    for (key, value), (left, right) in zip(wanted.cache.memories, again, strict=True):
        torch.testing.assert_close(left, key, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(right, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_left_to_the_modules(name: str) -> None:
    model = small(*NOT_COVERED[name], dtype=torch.float64)
    assert packed(model, torch.float64) is None
    greedy = Sampling(temperature=0)
    wanted = write(EagerDecoder(model), PROMPTS, 20, greedy)
    assert write(GraphDecoder(model, dtype=torch.float64), PROMPTS, 20, greedy) == wanted


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_writing_equals_eager_writing_for_greedy_choices(penalty: float) -> None:
    model = small("moeut_tiny", [])
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    decoder = GraphDecoder(model)
    assert decoder.is_fused
    for prompts in (PROMPTS, [[3, 1], [2, 2, 2], [9]], [[4]]):  # the second time nothing is allocated anew
        assert write(decoder, prompts, 40, sampling) == write(EagerDecoder(model), prompts, 40, sampling)


def test_draws_belong_to_the_seed_of_their_sequence() -> None:
    model = small("moeut_tiny", [])
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95)
    decoder = GraphDecoder(model)
    together = write(decoder, PROMPTS, 20, sampling, [3, 4, 5])
    alone = [
        write(decoder, [prompt], 20, sampling, [seed])[0]
        for prompt, seed in zip(PROMPTS, (3, 4, 5), strict=True)
    ]
    assert together == alone == write(decoder, PROMPTS, 20, sampling, [3, 4, 5])[:2] + alone[2:]
    assert write(decoder, PROMPTS, 20, sampling, [6, 7, 8]) != together


def _empty():
    from moeut_compose import Cache

    return Cache()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 12, 64])
@pytest.mark.parametrize("name", [*COVERED, "SUT", "MoEUT with ACT"])
def test_graphs_write_what_eager_decoding_writes(name: str, batch: int) -> None:
    """In float32 on the GPU: the packed model with its kernels, recorded, against the modules."""
    model = small(*(COVERED | NOT_COVERED)[name]).cuda()
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (1 + index % 7,), generator=generator).tolist() for index in range(batch)]
    greedy = Sampling(temperature=0)
    eager = write(EagerDecoder(model), prompts, 30, greedy)
    graphed = write(GraphDecoder(model, dtype=torch.float32), prompts, 30, greedy)
    alike = sum(left == right for left, right in zip(eager, graphed, strict=True))
    assert alike >= 0.95 * batch  # sums in another order may turn a near-tie in one of many


@pytest.mark.gpu
def test_half_precision_stays_close_to_full_precision() -> None:
    model = small("moeut_tiny", []).cuda()
    fused = packed(model, torch.bfloat16)
    ids = torch.randint(97, (12, 9), device="cuda")
    lengths = torch.full((12,), 8, device="cuda")
    with torch.no_grad():
        cache = model(ids[:, :8], cache=_empty()).cache.with_room(lengths, 256)
        half = tuple((key.bfloat16(), value.bfloat16()) for key, value in cache.memories)
        wanted = model(ids[:, 8:], cache=cache).logits[:, 0]
        fused.make_room(256)
        logits = fused.step(ids[:, 8], lengths, half)
    error = (logits - wanted).norm(dim=1) / wanted.norm(dim=1)
    # a rounded score sends some tokens to other experts, and then to more of them
    assert error.median() < 0.01
    assert error.max() < 1
