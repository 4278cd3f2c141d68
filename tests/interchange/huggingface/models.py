"""Small runs of every family, written without training."""

import random
from pathlib import Path

import torch

from moeut_compose.build import build_model
from moeut_compose.data.tokenizer import Tokenizer, train_tokenizer
from moeut_compose.interchange.checkpoints import write_run
from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import TrainSentencePiece
from moeut_compose.train.run import Run, load_run

VOCAB = 400
SIZE = [f"vocab_size={VOCAB}", "context_length=24", "d_model=48"]

FAMILIES: dict[str, list[str]] = {
    "albert_tiny": [],
    "aux_free_moe_tiny": [],
    "deepseek_moe_tiny": [],
    "dense_tiny": [],
    "looped_tiny": [],
    "moeut_act_tiny": [],
    "moeut_tiny": [],
    "relaxed_recursive_tiny": [],
    "remoe_tiny": [],
    "sigma_moe_tiny": [],
    "sut_tiny": [],
    "switch_tiny": [],
    "switchhead_tiny": [],
    "universal_transformer_tiny": [],
    "dense_tiny post": ["norm.placement=post", "final_norm=false", "embedding.scale=sqrt_d_model"],
    "moeut_tiny AABB": ["stages.0.pattern=AABB"],
    "moeut_tiny pre": ["norm.placement=pre"],
    "moeut_tiny post": ["norm.placement=post", "final_norm=false"],
    "moeut_tiny tied": ["head={tied: true, bias: true}", "norm={kind: rms_norm, placement: pre}"],
    "sut_tiny without halting": ["stages.0.halting={kind: none}", "embedding.norm=layer_norm"],
    "dense_tiny without positions": ["position={kind: none}", "head={tied: true, bias: false}"],
}
"""Every architecture that ships in a small size, and what else can be combined."""


def family(name: str) -> ModelSpec:
    return load_spec(name.partition(" ")[0], [*SIZE, *FAMILIES[name]])


def tokenizer_of(spec: TrainSentencePiece) -> Tokenizer:
    dice = random.Random(2)
    words = ["".join(dice.choices("etaoinshrdlucmfwypvbgkjqxz", k=dice.randrange(2, 9))) for _ in range(600)]
    texts = [
        f"The sea was {' '.join(dice.choices(words, k=12))}, {dice.randrange(2000)}." for _ in range(400)
    ]
    return train_tokenizer(spec, texts, vocab_size=VOCAB)


def small_run(folder: Path, spec: ModelSpec, *, tokenizer: Tokenizer | None = None, seed: int = 3) -> Run:
    """A run folder around fresh weights, loaded. Gates and tables that start at zero are moved away from it."""
    model = build_model(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "selection_bias" in n)]:
            if not tensor.any():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    recipe = load_recipe("quickstart")
    write_run(folder, spec=spec, recipe=recipe, model=model, step=7, tokenizer=tokenizer, imported={})
    return load_run(folder)
