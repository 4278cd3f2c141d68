"""Sweep files: which runs they mean, what those are called, and where mistakes are shown."""

import json
from pathlib import Path

import jsonschema
import pytest

from moeut_compose.spec.expand import MAX_RUNS, Sweep, load_sweep
from moeut_compose.spec.find import NotFound
from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.problems import SpecError
from moeut_compose.spec.schema import plain_schema
from moeut_compose.spec.sweep import SweepSpec
from tests.conftest import ROOT

HEAD = "version: 1\nname: s\narchitectures: [moeut_tiny]\nrecipes: [quickstart]\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swept(text: str) -> Sweep:
    Path("sweep.yaml").write_text(text)
    return load_sweep(Path("sweep.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        swept(text)
    return str(caught.value).splitlines()


def test_a_grid_is_every_combination_in_order() -> None:
    sweep = swept(
        "name: s\narchitectures: [dense_tiny, moeut_tiny]\nrecipes: [quickstart]\n"
        "changes: {recipe.steps: 5}\n"
        "grid:\n  recipe.optimizer.lr: [1e-3, 3e-3]\n  stages.0.repeats: [1, 2]\n"
    )
    assert [run.name for run in sweep.runs] == [
        f"{name}-lr_{lr}-repeats_{repeats}"
        for name in ("dense_tiny", "moeut_tiny")
        for lr in ("0.001", "0.003")
        for repeats in (1, 2)
    ]
    last = sweep.runs[-1]
    assert last.architecture == load_spec("moeut_tiny", ["stages.0.repeats=2"])
    assert last.recipe == load_recipe("quickstart", ["steps=5", "optimizer.lr=3e-3"])
    assert last.changes == {
        "architecture": "moeut_tiny",
        "recipe": "quickstart",
        "recipe.optimizer.lr": 0.003,
        "stages.0.repeats": 2,
    }
    assert (last.steps, last.tokens) == (5, 5 * 8 * 256)


def test_variants_are_changes_that_belong_together() -> None:
    sweep = swept(
        HEAD + "variants:\n  - {}\n  - {d_model: 64, recipe.steps: 7}\ngrid: {recipe.seed: [0, 1]}\n"
    )
    assert [run.name for run in sweep.runs] == [
        "moeut_tiny-seed_0",
        "moeut_tiny-seed_1",
        "moeut_tiny-d_model_64-seed_0-steps_7",
        "moeut_tiny-d_model_64-seed_1-steps_7",
    ]
    assert [run.architecture.d_model for run in sweep.runs] == [128, 128, 64, 64]
    assert [run.steps for run in sweep.runs] == [300, 300, 7, 7]


def test_names_stay_when_values_are_added_or_move() -> None:
    few = swept(HEAD + "grid:\n  d_model: [64, 128]\n  recipe.optimizer.lr: [1e-3]\n")
    more = swept(HEAD + "grid:\n  recipe.optimizer.lr: [0.002, 0.001]\n  d_model: [32, 128, 64]\n")
    by_name = {run.name: run for run in more.runs}
    assert all(by_name[run.name].architecture == run.architecture for run in few.runs)


def test_names_are_folders_whatever_the_values() -> None:
    sweep = swept(
        HEAD
        + "grid:\n  norm: [{kind: layer_norm, placement: pre}, {kind: layer_norm, placement: post}]\n"
        + "  recipe.evaluation.prompt: [a/b, a b, ..]\n"
        + "  stages.0.layers.0.mixer.top_k: [1]\n  stages.0.layers.0.feedforward.top_k: [1]\n"
    )
    names = [run.name for run in sweep.runs]
    assert len(set(names)) == 6
    assert all("/" not in name and " " not in name and len(name) <= 120 for name in names)


def test_specs_are_looked_for_beside_the_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "mine.yaml").write_text("extends: moeut_tiny\nd_model: 64\n")
    (folder / "sweep.yaml").write_text("name: s\narchitectures: [mine.yaml]\nrecipes: [quickstart]\n")
    (run,) = load_sweep(folder / "sweep.yaml").runs
    assert (run.name, run.architecture.d_model) == ("mine", 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("architecture: [moeut_tiny]\nname: s\n", ["sweep.yaml:1:1: architecture: unknown key; did you mean architectures?"]),
        (HEAD + "d_model: 3\n", ["sweep.yaml:5:1: d_model: unknown key; belongs below changes, grid or variants, as d_model"]),
        (
            HEAD + "batch: {size: 3}\n",
            ["sweep.yaml:5:1: batch: unknown key; belongs below changes, grid or variants, as recipe.batch"],
        ),
        (HEAD + "grid:\n  recipe.context: 5\n", ["sweep.yaml:6:19: grid.recipe.context: expected a list, got 5"]),
        (HEAD + "grid:\n  d_modle: [64]\n", ["sweep.yaml:6:3: d_modle: unknown key; did you mean d_model?"]),
        (
            HEAD + "grid:\n  recipe.optimizer.lr: [1e-3, fast]\n",
            ["sweep.yaml:6:31: optimizer.lr: expected a number, got the text 'fast'"],
        ),
        (
            HEAD + "changes:\n  recipe.batch: {sise: 3}\nvariants:\n  - {d_model: 0}\n",
            [
                "sweep.yaml:6:18: batch.sise: unknown key; did you mean size?",
                "sweep.yaml:8:15: d_model: expected a number above 0, got 0",
            ],
        ),
        (
            "name: s\narchitectures: [moeut_tinny]\n",
            [
                "sweep.yaml:2:17: architectures.0: moeut_tinny is neither an architecture nor a file; "
                "did you mean moeut_tiny or moeut_act_tiny or remoe_tiny?"
            ],
        ),
        (HEAD + "grid: {d_model: [64, 64]}\n", ["sweep.yaml:1:1: 2 runs are the same: moeut_tiny-d_model_64"]),
        (HEAD.replace("1", "2"), ["sweep.yaml:1:10: version: 2 is not a version that this release reads; it reads 1"]),
    ],
)  # fmt: skip
def test_mistakes_are_shown_where_they_are(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_a_sweep_that_never_ends_is_refused() -> None:
    values = list(range(1, 40))
    (problem,) = problems(HEAD + f"grid: {{d_model: {values}, recipe.steps: {values}}}\n")
    assert f"1,521 runs; more than {MAX_RUNS:,}" in problem


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(NotFound, match=r"nowhere\.yaml is not a file"):
        load_sweep(Path("nowhere.yaml"))


def test_the_schema_in_the_repository_is_this_one_and_fits() -> None:
    schema = plain_schema(SweepSpec)
    stored = (ROOT / "schemas" / "sweep.json").read_text()
    assert stored == json.dumps(schema, indent=2, ensure_ascii=False) + "\n", "moeut-compose schema sweep"
    validator = jsonschema.Draft202012Validator(schema)
    good = {"name": "s", "architectures": ["a"], "grid": {"d_model": [1]}, "variants": [{"a.b": 1}]}
    assert list(validator.iter_errors(good)) == []
    assert list(validator.iter_errors(good | {"grid": {"d_model": 1}}))
    assert list(validator.iter_errors({"name": "s"}))
