"""Every published run is an architecture and a recipe of ours, setting for setting and count for count."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.feedforwards import DenseSpec
from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.mixers import AttentionSpec, MixtureOfAttentionSpec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.positions import RelativeSpec, RopeSpec
from moeut_compose.spec.recipe import RecipeSpec

REFERENCE = Path(__file__).parents[1] / "reference" / "variants.yaml"
PUBLISHED = {run["name"]: run for run in yaml.safe_load(REFERENCE.read_text())["variants"]}
OURS = yaml.safe_load((Path(__file__).parent / "published_runs.yaml").read_text())
DATASETS = {
    "c4": "allenai/c4",
    "pes2o": "allenai/peS2o/data/v2",
    "slimpajama": "cerebras/SlimPajama-627B",
    "thestack": "bigcode/the-stack",
}
DESCRIPTIVE = {"name", "role", "notes", "size_class_m", "dataset", "n_microbatch"}
"""Keys of the reference that are no settings of a spec; the last two have tests of their own."""


def run(name: str) -> tuple[ModelSpec, RecipeSpec]:
    ours = OURS[name]
    return load_spec(ours["architecture"]), load_recipe(ours["recipe"], ours.get("overrides", []))


def weight(terms: list[Any], kind: str) -> float:
    """The coefficient of a balance term; zero without one."""
    return sum(term.weight for term in terms if term.kind == kind)


def settings(spec: ModelSpec, recipe: RecipeSpec) -> dict[str, Any]:
    """A spec and a recipe in the words of the reference."""
    return common(spec) | blocks(spec) | losses(spec) | training(spec, recipe) | counts(spec)


def common(spec: ModelSpec) -> dict[str, Any]:
    (stage,) = spec.stages
    (layer,) = stage.layers
    shared = stage.repeats > 1
    single = getattr(layer.mixer, "n_experts", None) == 1
    families = {"attention": "dense", "switch_head": "sigma_moe" if single else "moeut"}
    family = families.get(layer.mixer.kind, "sut")
    return {
        "family": family,
        "d_model": spec.d_model,
        "n_layers": spec.depth,
        "group_size": stage.n_members,
        "n_unique_layers": len(list(spec.members())),
        "group_pattern": stage.pattern.lower() if shared or family == "sigma_moe" else "none",
        "norm": spec.norm.placement,
        "final_norm": spec.final_norm,
        "input_norm": spec.embedding.norm != "none",
        "embedding_scale": pytest.approx(math.sqrt(spec.d_model) if spec.embedding.scale != 1 else 1.0),
        "act": stage.halting.kind == "act",
        "vocab_size": spec.vocab_size,
    }


def blocks(spec: ModelSpec) -> dict[str, Any]:
    mixer, feedforward = spec.stages[0].layers[0].mixer, spec.stages[0].layers[0].feedforward
    dense = isinstance(feedforward, DenseSpec)
    routed = not isinstance(mixer, AttentionSpec)
    sut = isinstance(mixer, MixtureOfAttentionSpec)
    position = spec.position
    return {
        "n_heads": mixer.n_heads,
        "d_head": mixer.d_head,
        "rope_dims": position.rotated_channels(mixer.d_head) if isinstance(position, RopeSpec) else None,
        "max_relative_positions": position.max_distance if isinstance(position, RelativeSpec) else None,
        "d_ff": feedforward.d_ff if dense else None,
        "ff_n_experts": None if dense else feedforward.n_experts,
        "ff_expert_size": None if dense else feedforward.d_expert,
        "ff_k": None if dense else feedforward.top_k,
        "att_n_experts": mixer.n_experts if routed else None,
        "att_k": mixer.top_k if routed else None,
        "att_expert_size": mixer.d_expert if sut else None,
        "sample_topk": mixer.router.n_sampled if sut else 0,
    }


def losses(spec: ModelSpec) -> dict[str, Any]:
    (stage,) = spec.stages
    mixer, feedforward = stage.layers[0].mixer, stage.layers[0].feedforward
    ours, theirs = getattr(feedforward, "balance", []), getattr(mixer, "balance", [])
    information = {weight(terms, "mutual_information_as_coded") for terms in (ours, theirs)}
    assert len(information) == 1
    entropies = [term for term in (*ours, *theirs) if term.kind == "entropy"]
    assert all(term.scope == "sequence" for term in entropies)
    return {
        "entropy_reg": weight(ours, "entropy"),
        "att_entropy_reg": weight(theirs, "entropy"),
        "entropy_reg_mode": "layers_time" if entropies else None,
        "act_loss": stage.halting.weight if stage.halting.kind == "act" else 0.0,
        "mi_loss": information.pop(),
    }


def training(spec: ModelSpec, recipe: RecipeSpec) -> dict[str, Any]:
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.optimizer.eps == 1e-8
    assert recipe.schedule.kind == "cosine"
    return {
        "lr": recipe.optimizer.lr,
        "min_lr_multiplier": recipe.schedule.min_lr_multiplier,
        "warmup_steps": recipe.schedule.warmup_steps,
        "grad_clip": recipe.clip_norm,
        "batch_size": recipe.batch.size,
        "context": recipe.context or spec.context_length,
        "steps": recipe.steps,
        "weight_decay": recipe.optimizer.weight_decay,
    }


def counts(spec: ModelSpec) -> dict[str, Any]:
    params, macs = count_params(spec), count_macs(spec, 1024)
    try:
        per_sequence = 1024 * count_macs(spec, 1024, "paper").layers_per_token
    except ValueError:
        per_sequence = None
    breakdown = dict(macs.by_component)
    head = breakdown.pop("lm_head")
    return {
        "params": params.total,
        "params_layers": params.layers,
        "params_embedding": params.embedding,
        "params_lm_head": params.head,
        "params_final_norm": spec.final_norm_params(),
        "macs_per_sequence": per_sequence,
        "macs_exact_per_token": macs.layers_per_token,
        "lm_head_macs_per_token": head,
        "macs_exact_breakdown": breakdown,
    }


def test_no_run_is_left_out() -> None:
    assert len(PUBLISHED) == 43
    assert OURS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_and_counts(name: str) -> None:
    published = {key: value for key, value in PUBLISHED[name].items() if key not in DESCRIPTIVE}
    assert published == settings(*run(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_data(name: str) -> None:
    _, recipe = run(name)
    assert DATASETS[PUBLISHED[name]["dataset"]] in recipe.data.model_dump_json()
    assert bool(recipe.data.separator) is (PUBLISHED[name]["dataset"] != "thestack")
    assert recipe.order == ("shuffled" if PUBLISHED[name]["dataset"] == "thestack" else "streams")


@pytest.mark.parametrize("name", PUBLISHED)
def test_micro_batches(name: str) -> None:
    """They change results where a term is taken over the micro-batch, so there they are as published."""
    spec, recipe = run(name)
    micro = 64 // (PUBLISHED[name]["n_microbatch"] or 1)
    terms = [term for layer in spec.stages[0].layers for term in getattr(layer.mixer, "balance", [])]
    allowed = {micro} if any(term.scope == "micro_batch" for term in terms) else {micro, "auto"}
    assert recipe.batch.micro in allowed


def test_every_architecture_of_the_paper_is_used() -> None:
    used = {ours["architecture"] for ours in OURS.values()}
    folder = Path(__file__).parents[2] / "architectures"
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    published = {
        name for name in names if name.split("/")[-1].startswith(("dense", "moeut", "sigma_moe", "sut"))
    }
    assert used >= {name for name in published if not name.endswith("_tiny")}
