"""A batch of prompts of different lengths gives each what it gives alone; with a cache what it gives without."""

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.generate.decoding import EagerDecoder
from moeut_compose.generate.sampling import Sampling
from moeut_compose.spec.io import load_spec

FAMILIES = {
    "dense, rope": ("dense_tiny", []),
    "dense, no positions": ("dense_tiny", ["position={kind: none}"]),
    "dense, relative positions": ("dense_tiny", ["position={kind: relative, max_distance: 8}"]),
    "sigma-MoE": ("sigma_moe_tiny", []),
    "SwitchHead": ("switchhead_tiny", []),
    "SUT with ACT": ("sut_tiny", []),
    "MoEUT": ("moeut_tiny", []),
    "MoEUT with ACT": ("moeut_act_tiny", []),
    "Universal Transformer": ("universal_transformer_tiny", []),
    "softmax MoE": ("switch_tiny", []),
    "biased sigmoid MoE": ("aux_free_moe_tiny", []),
    "relaxed recursion": ("relaxed_recursive_tiny", []),
}
SMALL = ["vocab_size=97", "d_model=32", "context_length=64"]
LENGTHS = (9, 1, 14)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    name, overrides = FAMILIES[request.param]
    built = build_model(load_spec(name, SMALL + overrides), dtype=torch.float64, seed=1).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # leave no zero initialisation that would hide a fault
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.05)
    return built


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]


def write(model: torch.nn.Module, prompts: list[list[int]], n: int, **settings) -> list[list[int]]:
    decoder = EagerDecoder(model)
    settings = {"sampling": GREEDY, "seeds": range(len(prompts))} | settings
    decoder.begin(prompts, max_new_tokens=n, **settings)
    pieces = [decoder.more() for _ in range(n)]
    return [[token for piece in pieces for token in piece[row]] for row in range(len(prompts))]


@pytest.mark.parametrize("n", [20, pytest.param(256, marks=pytest.mark.slow)])
def test_a_batch_gives_what_each_prompt_gives_alone_and_without_a_cache(model, prompts, n: int) -> None:
    together = write(model, prompts, n)
    assert together == [write(model, [prompt], n)[0] for prompt in prompts]
    with torch.no_grad():  # one full pass over each text repeats every choice: no cache is involved
        for prompt, written in zip(prompts, together, strict=True):
            logits = model(torch.tensor([prompt + written[:-1]])).logits[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == written


def test_draws_do_not_depend_on_what_is_written_beside(model, prompts) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    together = write(model, prompts, 12, sampling=sampling, seeds=[4, 5, 6])
    alone = [
        write(model, [prompt], 12, sampling=sampling, seeds=[seed])[0]
        for prompt, seed in zip(prompts, [4, 5, 6], strict=True)
    ]
    assert together == alone
    assert write(model, prompts, 12, sampling=sampling, seeds=[7, 8, 9]) != together
