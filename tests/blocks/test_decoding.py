"""Incremental decoding with a cache equals the full forward pass."""

import pytest
import torch

from moeut_compose import Cache
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec

FAMILIES = {
    "dense": ("dense_tiny", []),
    "sigma_moe": ("sigma_moe_tiny", []),
    "moeut": ("moeut_tiny", []),
    "moeut aabb": ("moeut_tiny", ["stages.0.pattern=AABB"]),
    "moeut pre": ("moeut_tiny", ["norm.placement=pre"]),
    "moeut post": ("moeut_tiny", ["norm.placement=post"]),
    "moeut with halting": ("moeut_tiny", ["stages.0.halting={kind: act}"]),
    "sut": ("sut_tiny", []),
    "sut without halting": ("sut_tiny", ["stages.0.halting={kind: none}"]),
    "beyond the context": ("moeut_tiny", ["context_length=8"]),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    name, overrides = FAMILIES[request.param]
    built = build_model(load_spec(name, overrides), dtype=torch.float64, seed=1).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # leave no zero initialisation that would hide a fault
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.05)
    return built


@torch.no_grad()
@pytest.mark.parametrize(
    "pieces", [[1] * 20, [13, 7], [5, 9, 1, 1, 4]], ids=["one by one", "two pieces", "ragged"]
)
def test_pieces_give_the_logits_of_the_whole(model: torch.nn.Module, pieces: list[int]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (2, 20))
    whole = model(ids).logits
    cache, parts = Cache(), []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, cache=cache)
        cache, parts = out.cache, [*parts, out.logits]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_cache_is_a_value(model: torch.nn.Module) -> None:
    ids = torch.arange(6).expand(1, 6)
    prefix = model(ids, cache=Cache()).cache
    first = model(ids[:, :2], cache=prefix).logits
    model(ids[:, 3:], cache=prefix)
    assert torch.equal(model(ids[:, :2], cache=prefix).logits, first)


def test_one_memory_per_application() -> None:
    spec = load_spec("moeut_tiny")
    out = build_model(spec)(torch.zeros(1, 3, dtype=torch.long), cache=Cache())
    assert len(out.cache.memories) == spec.depth == 6
