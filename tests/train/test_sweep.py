"""Sweeps: what is finished stays, what was cut goes on, what fails is reported, and the table is always the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeut_compose.spec.expand import Sweep, load_sweep
from moeut_compose.spec.io import dump_yaml
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.checkpoint import list_checkpoints
from moeut_compose.train.errors import Interrupted, RunError
from moeut_compose.train.folder import locked
from moeut_compose.train.sweep import Outcome, is_finished, run_sweep, table_of

TIMING = {"tokens_per_second", "memory_gib"}


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half of the time of these runs and is tested elsewhere."""

    def touch(rows: list[dict], folder: Path, title: str) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "loss.png").touch()
        return folder / "loss.png"

    monkeypatch.setattr(session, "plot_loss", touch)


@pytest.fixture
def sweep(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> Sweep:
    (tmp_path / "tiny.yaml").write_text(dump_yaml(spec))
    (tmp_path / "short.yaml").write_text(dump_yaml(recipe))
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "name: rates\narchitectures: [tiny.yaml]\nrecipes: [short.yaml]\n"
        "grid: {recipe.optimizer.lr: [1e-3, 3e-3, 1e-2]}\n"
    )
    return load_sweep(path)


def table(outcomes: list[Outcome]) -> list[dict]:
    """Everything but times."""
    header, rows = table_of(outcomes)
    return [{k: v for k, v in zip(header, row, strict=True) if k not in TIMING} for row in rows]


def stored(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in TIMING}
        for row in json.loads((folder / "results.json").read_text())
    ]


def test_a_killed_sweep_goes_on_to_the_same_table(sweep: Sweep, tmp_path: Path) -> None:
    """With a real process and SIGKILL in the middle of the second run."""
    whole = table(run_sweep(sweep, tmp_path / "whole"))
    assert [row["status"] for row in whole] == ["done"] * 3
    assert [row["recipe.optimizer.lr"] for row in whole] == [0.001, 0.003, 0.01]
    assert len({row["validation_loss"] for row in whole}) == 3
    killed = tmp_path / "killed"
    code = (
        "import os, pathlib, signal, torch\n"
        "torch.set_num_threads(1)\n"
        "from moeut_compose.spec.expand import load_sweep\n"
        "from moeut_compose.train import loop, plan, session, sweep\n"
        "from moeut_compose.train.memory import Activations\n"
        "plan.measure_cpu_flops = lambda: 1e11\n"
        "plan.trace_activations = lambda *_, **__: Activations(fixed=0, per_sequence=2**20)\n"
        "step, base = loop.Trainer.train_step, 0.003\n"
        "def fatal(self, *a, **k):\n"
        "    if self.step == 6 and self._base_lr == base: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "loop.Trainer.train_step = fatal\n"
        f"sweep.run_sweep(load_sweep(pathlib.Path('sweep.yaml')), pathlib.Path({str(killed)!r}))\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [row["status"] for row in stored(killed)] == ["done", "waiting", "waiting"]
    first, second, third = (killed / run.name for run in sweep.runs)
    assert [path.name for path in list_checkpoints(second)] == ["step-00000004"]
    assert not third.exists()
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    assert table(run_sweep(sweep, killed)) == whole
    assert stored(killed) == stored(tmp_path / "whole")
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    assert len(json.loads((second / "environment.json").read_text())["starts"]) == 2


def test_a_run_that_fails_does_not_stop_the_others(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeut_compose.train import sweep as module

    train = module.train

    def fails(spec: ModelSpec, recipe: RecipeSpec, **options: object) -> object:
        if recipe.optimizer.lr == 0.003:
            raise RuntimeError("CUDA error:\n the device is on fire")
        return train(spec, recipe, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", fails)
        outcomes = run_sweep(sweep, tmp_path / "s")
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].error == "CUDA error: the device is on fire"
    assert outcomes[1].row is None
    assert stored(tmp_path / "s")[1]["error"] == outcomes[1].error
    assert "| failed |" in (tmp_path / "s" / "results.md").read_text()
    assert (tmp_path / "s" / "results.csv").read_text().splitlines()[2].split(",")[1] == "failed"
    again = run_sweep(sweep, tmp_path / "s")
    assert [outcome.status for outcome in again] == ["done"] * 3, "tried again"


def test_a_signal_stops_the_whole_sweep(sweep: Sweep, tmp_path: Path, stop_at) -> None:
    reporter = stop_at("training", 3.0, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted) as caught:
        run_sweep(sweep, tmp_path / "s", reporter=reporter)
    assert caught.value.exit_code == 130
    assert not (tmp_path / "s" / sweep.runs[1].name).exists()
    assert any("the same command goes on" in message for message in reporter.messages)
    assert [outcome.status for outcome in run_sweep(sweep, tmp_path / "s")] == ["done"] * 3


def test_a_run_torn_before_its_first_checkpoint_begins_anew(sweep: Sweep, tmp_path: Path) -> None:
    torn = tmp_path / "s" / sweep.runs[0].name
    (torn / "validation").mkdir(parents=True)
    (torn / "architecture.yaml").write_text("name: ha")
    (torn / "metrics.jsonl").write_text('{"event": "tr')
    (torn / "notes.txt").write_text("")
    outcome = run_sweep(sweep, tmp_path / "s")[0]
    assert outcome.status == "failed", "a file that is not a run's is left alone"
    assert "is not empty" in str(outcome.error)
    (torn / "notes.txt").unlink()
    assert run_sweep(sweep, tmp_path / "s")[0].status == "done"


def test_finished_means_this_very_run(sweep: Sweep, tmp_path: Path) -> None:
    from dataclasses import replace

    run_sweep(replace(sweep, runs=sweep.runs[:1]), tmp_path / "s")
    run = sweep.runs[0]
    folder = tmp_path / "s" / run.name
    assert is_finished(folder, run)
    longer = replace(run, recipe=run.recipe.model_copy(update={"steps": 9}))
    assert not is_finished(folder, longer)
    assert not is_finished(folder, replace(run, recipe=run.recipe.model_copy(update={"clip_norm": 1.0})))
    (folder / "plots" / "loss.png").unlink()
    assert not is_finished(folder, run)


def test_one_process_at_a_time(sweep: Sweep, tmp_path: Path) -> None:
    with locked(tmp_path / "s"), pytest.raises(RunError, match="another process"):
        run_sweep(sweep, tmp_path / "s")
