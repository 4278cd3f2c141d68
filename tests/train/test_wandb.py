"""Weights & Biases gets the rows of the metrics, or the run says at once that it cannot.

The package is not installed for tests; the stand-in takes the calls that version 0.22 documents.
"""

import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import LoggingSpec, RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.errors import Interrupted, TrainError
from moeut_compose.train.metrics import read_rows, scalars
from moeut_compose.train.run import train


class Run:
    def __init__(self, options: dict) -> None:
        self.options, self.logged, self.metrics, self.finished = options, [], [], False

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict) -> None:
        assert not self.finished
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class Refused(Exception):
    pass


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    begun: list[Run] = []

    def init(**options) -> Run:
        begun.append(Run(options))
        return begun[-1]

    module = ModuleType("wandb")
    module.init, module.errors = init, SimpleNamespace(Error=Refused)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


@pytest.fixture
def logged(recipe: RecipeSpec) -> RecipeSpec:
    return recipe.model_copy(update={"logging": LoggingSpec(interval=3, wandb=True)})


def test_every_number_of_every_row_arrives(spec: ModelSpec, logged: RecipeSpec, runs: list[Run]) -> None:
    folder = train(spec, logged, device="cpu").folder
    (run,) = runs
    assert run.finished
    assert run.metrics == [("*", "step")]
    assert run.options["dir"] == str(folder)
    assert run.options["config"]["recipe"]["batch"]["size"] == 6
    rows = read_rows(folder / "metrics.jsonl")
    assert run.logged[0].keys() > {
        "step",
        "train/loss",
        "train/load.stages.0.layers.0.feedforward.router.entropy",
    }
    assert run.logged[0]["load_by_repeat/stages.0.layers.0.feedforward.router.entropy/1"] > 0
    assert run.logged == [scalars(row) | {"step": row["step"]} for row in rows]


def test_a_resumed_run_is_the_same_one(
    spec: ModelSpec, logged: RecipeSpec, runs: list[Run], tmp_path, stop_at
) -> None:
    reporter = stop_at("training", 5.0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(spec, logged, out=tmp_path / "run", device="cpu", reporter=reporter)
    train(spec, logged, out=tmp_path / "run", device="cpu")
    first, second = runs
    assert first.finished
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    train(spec, logged, out=tmp_path / "other", device="cpu")
    assert runs[2].options["id"] != first.options["id"]


def test_a_missing_package_is_told_before_anything_is_prepared(
    spec: ModelSpec, logged: RecipeSpec, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainError, match=r"needs Weights & Biases, .*pip install 'moeut-compose\[wandb\]'"):
        train(spec, logged, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_what_keeps_it_from_beginning_is_told(
    spec: ModelSpec, logged: RecipeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options) -> None:
        raise Refused("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(TrainError, match="cannot begin: no key; WANDB_MODE=offline"):
        train(spec, logged, device="cpu")
