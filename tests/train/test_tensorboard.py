"""TensorBoard gets the rows of the metrics, or the run says at once that it cannot."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import LoggingSpec, RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.errors import TrainError
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import train

MODULE = "torch.utils.tensorboard"


class Writer:
    """Stands in for `SummaryWriter`."""

    made: list["Writer"]

    def __init__(self, folder: str, *, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def flush(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")
    module = ModuleType(MODULE)
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    Writer.made = []
    return Writer.made


def logged(recipe: RecipeSpec, **changes: object) -> RecipeSpec:
    return recipe.model_copy(update={"logging": LoggingSpec(interval=3, tensorboard=True), **changes})


def test_every_number_of_every_row_is_a_scalar(
    spec: ModelSpec, recipe: RecipeSpec, writers: list[Writer]
) -> None:
    run = train(spec, logged(recipe)).folder
    (writer,) = writers
    assert (writer.folder, writer.purge_step, writer.closed) == (str(run / "tensorboard"), 1, True)
    expected = {
        (f"{row['event']}/{name}", row["step"]): value
        for row in read_rows(run / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("event", "step", "load_by_repeat") and value is not None
    }
    repeats = {
        (f"load_by_repeat/{router}.{figure}/{repeat}", row["step"]): value
        for row in read_rows(run / "metrics.jsonl")
        for router, figures in row.get("load_by_repeat", {}).items()
        for figure, values in figures.items()
        for repeat, value in enumerate(values)
    }
    assert len(repeats) == 3 * 6 * 3 * 2, "rows, routers, figures, repeats"
    assert writer.scalars == expected | repeats
    assert ("train/cross_entropy", 6) in expected
    assert ("validation/perplexity", 8) in expected


def test_a_resumed_run_hides_what_it_writes_again(
    spec: ModelSpec, recipe: RecipeSpec, writers: list[Writer]
) -> None:
    run = train(spec, logged(recipe)).folder
    train(spec, logged(recipe, steps=10), out=run)
    assert [writer.purge_step for writer in writers] == [1, 9]


def test_nothing_is_written_unless_asked(spec: ModelSpec, recipe: RecipeSpec, writers: list[Writer]) -> None:
    train(spec, recipe)
    assert not writers


def test_without_tensorboard_a_run_does_not_start(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(TrainError, match=r"pip install 'moeut-compose\[tensorboard\]'") as caught:
        train(spec, logged(recipe), out=tmp_path / "run")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run").exists()
