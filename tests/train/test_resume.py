"""A run that was stopped anywhere and resumed ends in the same bits as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeut_compose.spec.io import dump_yaml
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import session
from moeut_compose.train.errors import CheckpointError, Interrupted, RunError
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import load_run, train


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half of the time of these runs and is tested elsewhere."""
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")


TIMING = {"tokens_per_second", "mfu", "memory_bytes", "data_wait"}


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def metrics(run: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in TIMING}
        for row in read_rows(run / "metrics.jsonl")
    ]


def assert_same_run(a: Path, b: Path, step: int = 8) -> None:
    left, right = weights(a, step), weights(b, step)
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert metrics(a) == metrics(b)
    assert (a / "router_load.csv").read_text() == (b / "router_load.csv").read_text()
    assert {row["step"] for row in metrics(a) if row["event"] == "train"} == {3, 6, 8}
    assert {row["step"] for row in metrics(a) if row["event"] == "validation"} == {3, 6, 8}
    state = [
        torch.load(run / f"checkpoints/step-{step:08d}/train_state.pt", weights_only=True) for run in (a, b)
    ]
    first, second = (s["trainer"]["optimizer"] for s in state)
    assert all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])
    assert torch.equal(state[0]["trainer"]["random"]["torch"], state[1]["trainer"]["random"]["torch"])


@pytest.fixture
def whole(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> Path:
    return train(spec, recipe, out=tmp_path / "whole").folder


@pytest.mark.parametrize(
    ("title", "amount", "signum", "code"),
    [
        ("training", 4.0, signal.SIGINT, 130),
        ("training", 4.5, signal.SIGTERM, 143),
        ("training", 0.1, signal.SIGTERM, 143),
        ("evaluating", 4, signal.SIGINT, 130),
    ],
    ids=["after a step", "within a step", "within the first step", "evaluating"],
)
def test_a_signal_saves_and_the_resumed_run_ends_in_the_same_bits(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, tmp_path: Path, stop_at, title, amount, signum, code
) -> None:
    out = tmp_path / "stopped"
    reporter = stop_at(title, amount, lambda: signal.raise_signal(signum))
    with pytest.raises(Interrupted) as caught:
        train(spec, recipe, out=out, reporter=reporter)
    assert caught.value.exit_code == code
    assert caught.value.checkpoint is not None
    assert caught.value.checkpoint.is_dir()
    assert f"--resume {out}" in str(caught.value)
    assert load_run(out).step < 8
    result = train(spec, recipe, out=out)
    assert result.step == 8
    assert_same_run(whole, out)


def test_resuming_by_path_needs_no_out(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, tmp_path: Path, stop_at
) -> None:
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(
            spec,
            recipe,
            out=out,
            reporter=stop_at("training", 5.0, lambda: signal.raise_signal(signal.SIGINT)),
        )
    assert train(spec, recipe, resume=out / "checkpoints" / "latest").folder == out
    assert_same_run(whole, out)


def test_a_killed_process_goes_on_from_its_last_checkpoint(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, tmp_path: Path
) -> None:
    """With a real process and SIGKILL, which nothing can catch."""
    out = tmp_path / "killed"
    (tmp_path / "a.yaml").write_text(dump_yaml(spec))
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
    code = (
        "import os, pathlib, signal, torch\n"
        "torch.set_num_threads(1)\n"
        "from moeut_compose.spec.io import load_recipe, load_spec\n"
        "from moeut_compose.train import loop\n"
        "from moeut_compose.train.run import train\n"
        "step = loop.Trainer.train_step\n"
        "def fatal(self, *a, **k):\n"
        "    if self.step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "loop.Trainer.train_step = fatal\n"
        f"train(load_spec('a.yaml'), load_recipe('r.yaml'), out=pathlib.Path({str(out)!r}))\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == 6, (
        "rows after the checkpoint are there to be dropped"
    )
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    train(spec, recipe, out=out)
    assert_same_run(whole, out)


@pytest.mark.parametrize("victim", ["model.safetensors", "train_state.pt", "meta.json"])
def test_a_damaged_checkpoint_makes_way_for_the_one_before(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, tmp_path: Path, stop_at, victim: str
) -> None:
    out = tmp_path / "damaged"
    with pytest.raises(Interrupted):
        train(
            spec,
            recipe,
            out=out,
            reporter=stop_at("training", 6.0, lambda: signal.raise_signal(signal.SIGINT)),
        )
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    content = bytearray((newest / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / victim).write_bytes(content if victim != "meta.json" else content[: len(content) // 2])
    messages = stop_at("", 0, None)
    train(spec, recipe, out=out, reporter=messages)
    assert any(newest.name in text and victim in text for text in messages.messages)
    assert newest.with_name(f"{newest.name}.damaged").is_dir(), "evidence is kept, out of the way"
    assert_same_run(whole, out)


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path
) -> None:
    for path in (whole / "checkpoints").glob("step-*/meta.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        train(spec, recipe, out=whole)
    with (
        pytest.warns(UserWarning, match="trying an earlier checkpoint"),
        pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"),
    ):
        load_run(whole)


def test_a_finished_run_is_only_reported_again(spec: ModelSpec, recipe: RecipeSpec, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert train(spec, recipe, out=whole).step == 8
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_branching_off_leaves_the_first_run_alone(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, tmp_path: Path
) -> None:
    early = whole / "checkpoints" / "step-00000004"
    with pytest.raises(RunError, match="has checkpoints after step-00000004; name a new folder"):
        train(spec, recipe, resume=early)
    train(spec, recipe, resume=early, out=tmp_path / "branch")
    left, right = weights(whole, 8), weights(tmp_path / "branch", 8)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, r: (s.model_copy(update={"final_norm": False}), r), "another architecture .*final_norm"),
        (lambda s, r: (s, r.model_copy(update={"seed": 9})), r"recipe\.seed=3.*cannot go on with 9"),
        (lambda s, r: (s, r.model_copy(update={"context": 8})), r"recipe\.context=16"),
        (lambda s, r: (s, r.model_copy(update={"order": "streams"})), r"recipe\.order=shuffled"),
        (
            lambda s, r: (s, r.model_copy(update={"batch": r.batch.model_copy(update={"size": 5})})),
            r"recipe\.batch\.size=6",
        ),
    ],
)
def test_what_decides_the_data_cannot_change(
    spec: ModelSpec, recipe: RecipeSpec, whole: Path, change: Callable, says: str
) -> None:
    with pytest.raises(RunError, match=says):
        train(*change(spec, recipe), out=whole)


def test_changed_text_is_noticed(spec: ModelSpec, recipe: RecipeSpec, whole: Path, text_file: Path) -> None:
    text_file.write_text(text_file.read_text().replace("whale", "ship"))
    with pytest.raises(RunError, match="the training text or its tokenisation is not that of"):
        train(spec, recipe.model_copy(update={"steps": 9}), out=whole)


def test_a_longer_budget_goes_on(spec: ModelSpec, recipe: RecipeSpec, whole: Path) -> None:
    result = train(spec, recipe.model_copy(update={"steps": 10}), out=whole)
    assert result.step == 10
    assert json.loads((result.checkpoint / "meta.json").read_text())["step"] == 10


def test_two_processes_cannot_train_in_one_folder(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path, stop_at
) -> None:
    out = tmp_path / "shared"
    root = Path(__file__).resolve().parents[2]
    code = (
        "import fcntl, time\n"
        f"file = open({str(out / '.lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process is training in"):
            train(spec, recipe, out=out)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    start = time.monotonic()
    assert train(spec, recipe, out=out).step == 8, "a lock goes with its process"
    assert time.monotonic() - start < 60
