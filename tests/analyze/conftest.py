"""Small fresh models of every family, and a text of random tokens: untrained models have everything to look at."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.data.tokens import TokenFile, TokenIndex
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec

VOCABULARY = 60
CONTEXT = 12
SMALL = [f"vocab_size={VOCABULARY}", f"context_length={CONTEXT}"]
MOEUT = [
    *SMALL,
    "d_model=32",
    "stages.0.layers.0.mixer.n_heads=2",
    "stages.0.layers.0.mixer.d_head=8",
    "stages.0.layers.0.feedforward.n_experts=8",
    "stages.0.layers.0.feedforward.d_expert=8",
    "stages.0.layers.0.feedforward.top_k=3",
]
FAMILIES = {
    "dense_tiny": SMALL,
    "moeut_tiny": MOEUT,
    "sigma_moe_tiny": [
        *SMALL,
        "stages.0.layers.0.feedforward.n_experts=8",
        "stages.0.layers.0.feedforward.top_k=2",
    ],
    "switchhead_tiny": SMALL,
    "sut_tiny": SMALL,
    "moeut_act_tiny": MOEUT,
    "universal_transformer_tiny": SMALL,
    "looped_tiny": SMALL,
    "relaxed_recursive_tiny": SMALL,
    "remoe_tiny": SMALL,
    "deepseek_moe_tiny": SMALL,
    "switch_tiny": SMALL,
}

Make = Callable[[str], tuple[LanguageModel, ModelSpec]]


def make(name: str, *overrides: str) -> tuple[LanguageModel, ModelSpec]:
    spec = load_spec(name, [*FAMILIES.get(name, SMALL), *overrides])
    return build_model(spec, seed=1).eval(), spec


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text() -> TokenFile:
    return random_text()


def random_text() -> TokenFile:
    """Seven windows of 12 tokens, frequent ones among them."""
    ids = np.random.default_rng(0).zipf(1.4, 7 * CONTEXT + 1).clip(0, VOCABULARY - 1).astype(np.uint16)
    return TokenFile(ids, TokenIndex(n_tokens=len(ids), n_documents=1, n_bytes=3 * len(ids), dtype="<u2"))
