"""Recipes: published settings in the shipped files, and impossible combinations refused."""

import pytest
from pydantic import ValidationError

from moeut_compose.spec.find import list_specs
from moeut_compose.spec.io import SpecError, load_recipe
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import BuiltinData, CosineSchedule, HuggingFaceData, RecipeSpec

SHIPPED = [found.name for found in list_specs("recipes") if found.builtin]


def test_the_promised_recipes_exist() -> None:
    assert {
        "default",
        "quickstart",
        "paper",
        "paper_44m",
        "paper_pes2o",
        "paper_slimpajama",
        "paper_thestack",
    } <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_under_its_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("paper")])
def test_paper_recipes_hold_the_published_settings(name: str) -> None:
    recipe = load_recipe(name)
    is_small = name.endswith("44m")
    assert recipe.optimizer.model_dump(exclude={"kind", "fused"}) == {
        "lr": 2.5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01,
    }  # fmt: skip
    assert isinstance(recipe.schedule, CosineSchedule)
    assert (recipe.schedule.warmup_steps, recipe.schedule.min_lr_multiplier) == (0 if is_small else 4000, 0.1)
    assert recipe.clip_norm == (0.1 if is_small else 0.25)
    assert (recipe.num_steps(1024), recipe.batch.size, recipe.context) == (100_000, 64, None)
    assert isinstance(recipe.data, HuggingFaceData)
    assert recipe.data.max_tokens == 64 * 100_100 * 1024 + 1
    assert recipe.data.separator == ("" if "thestack" in name else "<STORY_SEP>")
    assert recipe.order == ("shuffled" if "thestack" in name else "streams")
    assert recipe.tokenizer.long_documents == "skip"


def test_paper_names_c4_at_the_published_revision() -> None:
    data = load_recipe("paper").data
    assert (data.dataset, data.config) == ("allenai/c4", "en")
    assert data.revision == "1ddc917116b730e1859edef32896ec5c16be51d0"


def test_default_takes_the_builtin_corpus_with_the_published_optimiser() -> None:
    default, paper = load_recipe("default"), load_recipe("paper")
    assert isinstance(default.data, BuiltinData)
    assert default.optimizer == paper.optimizer
    assert (default.batch, default.clip_norm) == (paper.batch, paper.clip_norm)
    share = default.schedule.warmup_steps / default.steps
    assert share == paper.schedule.warmup_steps / paper.steps, "the warm-up is the published share of the run"


def test_a_budget_in_tokens_is_rounded_up_to_steps() -> None:
    recipe = load_recipe("default", ["steps=null", "tokens=1e6", "batch.size=8"])
    assert recipe.num_steps(100) == 1250
    assert recipe.num_steps(1024) == 123


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["tokens=1000"], "steps=500 and tokens=1000 are both given"),
        (["steps=null"], "the recipe never ends"),
        (["batch.micro=65"], "micro=65 exceeds size=64"),
        (["checkpoint.keep_every=150"], "keep_every=150 must be a multiple of interval=100"),
        (["optimizer.betas=[0.9, 1.0]"], "must lie below 1"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["steps=0"], "steps"),
        (["precision=fp8"], "precision"),
        (["data.kind=parquet"], "data"),
        (["tokenizer.vocab_size=8000"], "tokenizer.vocab_size"),
        (["evaluation.window=3"], "windows"),
    ],
)
def test_bad_recipes_are_refused_by_name(overrides: list[str], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_recipe("default", overrides)
    assert any(says in f"{problem.path}: {problem.message}" for problem in caught.value.problems)


def test_recipes_and_architectures_share_no_key_but_their_labels() -> None:
    shared = set(RecipeSpec.model_fields) & set(ModelSpec.model_fields)
    assert shared == {"version", "name", "description"}


def test_types_are_strict() -> None:
    for wrong in ({"steps": "3"}, {"steps": True}, {"steps": 3, "compile": "yes"}, {"steps": 2.5}):
        with pytest.raises(ValidationError):
            RecipeSpec.model_validate({"name": "x", **wrong})
