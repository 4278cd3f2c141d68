"""Several processes do what one does: engines step by step, and whole runs that are stopped, resumed and killed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from moeut_compose.spec.io import dump_yaml
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import parallel, session
from moeut_compose.train.errors import TrainError
from moeut_compose.train.metrics import read_rows, scalars
from moeut_compose.train.plan import plan_training
from moeut_compose.train.run import load_run, train

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARCHITECTURES = ("dense_tiny", "moeut_tiny", "sut_tiny", "aux_free_moe_tiny")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "plot_loss", lambda rows, folder, title: folder / "loss.png")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / newest / "model.safetensors")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of every architecture by one process and by every engine of two and four."""
    out = tmp_path_factory.mktemp("engines")
    worker = str(HERE / "parallel_worker.py")
    for processes in (1, 2, 4):
        (out / str(processes)).mkdir()
        start = [sys.executable] if processes == 1 else torchrun(processes)
        done = subprocess.run(
            [*start, worker, str(out / str(processes))], env=environment(), capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()
    return out


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engines_take_the_steps_of_one_process(
    steps: Path, architecture: str, parallelism: str, processes: int
) -> None:
    """In float64, so that only an error of the method could show: losses, norms, weights, moments, perplexity."""
    alone = load_file(steps / "1" / f"{architecture}-alone.safetensors")
    shared = load_file(steps / str(processes) / f"{architecture}-{parallelism}.safetensors")
    assert set(shared) == set(alone)
    for name, value in alone.items():
        assert_close(shared[name], value, rtol=1e-5, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert alone["losses"][-1, 0] < alone["losses"][0, 0] - 0.1


def start_run(folder: Path, spec: ModelSpec, recipe: RecipeSpec, processes: int, out: Path, *words: str):
    (folder / "a.yaml").write_text(dump_yaml(spec))
    (folder / "r.yaml").write_text(dump_yaml(recipe))
    command = torchrun(
        processes, "-m", "moeut_compose", "train", "a.yaml", "--recipe", "r.yaml", "--device", "cpu"
    )
    return subprocess.Popen(
        [*command, "--out", str(out), *words], cwd=folder, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def test_a_run_of_two_processes_speaks_once_and_can_go_on_with_one(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path
) -> None:
    alone = train(spec, recipe, out=tmp_path / "alone", device="cpu")
    out, err = finished(
        start_run(tmp_path, spec, recipe, 2, tmp_path / "two", "recipe.parallelism=fsdp", "--json")
    )
    result = json.loads(out)
    assert result["step"] == 8
    assert result["sample"] == alone.sample
    assert err.count("a new run") == 1
    assert "2 processes (fsdp), each with CPU" in err
    assert_close(weights(tmp_path / "two"), weights(alone.folder), rtol=0, atol=1e-5)
    rows, expected = (read_rows(run / "metrics.jsonl") for run in (tmp_path / "two", alone.folder))
    assert [(row["event"], row["step"]) for row in rows] == [(row["event"], row["step"]) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        figures, wanted_figures = scalars(row), scalars(wanted)
        measured = {f"train/{name}" for name in ("tokens_per_second", "memory_bytes", "mfu", "data_wait")}
        for key in wanted_figures.keys() - measured:
            assert figures[key] == pytest.approx(wanted_figures[key], rel=1e-4, abs=1e-5), key
    assert "load_by_repeat/stages.0.layers.1.feedforward.router.max_over_mean/1" in scalars(expected[0])
    early = tmp_path / "two" / "checkpoints" / "step-00000004"
    train(spec, recipe, resume=early, out=tmp_path / "fewer", device="cpu")
    assert_close(weights(tmp_path / "fewer"), weights(alone.folder), rtol=0, atol=1e-5)


def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path
) -> None:
    out = tmp_path / "lost"
    long = recipe.model_copy(update={"steps": 100_000})
    process = start_run(tmp_path, spec, long, 2, out)
    try:
        wait_for(out / "checkpoints" / "latest", process)
        victim = child_of_rank(process.pid, 1)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        _, err = finished(process, code=1)
        assert time.monotonic() - killed < 60
    finally:
        process.kill()
    assert re.search(r"error: another process of this run is gone .*; what was saved is whole", err), err
    assert err.count("Traceback") == 1, "torchrun's own"
    saved = load_run(out).step
    assert saved >= 4
    assert train(spec, long.model_copy(update={"steps": saved + 2}), out=out, device="cpu").step == saved + 2


def test_a_signal_to_all_processes_saves_one_checkpoint(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    process = start_run(tmp_path, spec, recipe.model_copy(update={"steps": 100_000}), 2, out)
    try:
        wait_for(out / "checkpoints" / "latest", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert err.count("stopped by a signal; saved") == 1, err
    assert read_rows(out / "metrics.jsonl")
    assert load_run(out).step == int(re.search(r"saved .*step-(\d+);", err)[1])


def test_trouble_before_the_first_step_is_told_once(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    _, err = finished(start_run(tmp_path, spec, recipe, 2, tmp_path / "taken"), code=1)
    assert err.count("taken is not empty; name another folder") == 1, err


def test_a_batch_must_split_evenly(spec: ModelSpec, recipe: RecipeSpec) -> None:
    with pytest.raises(
        TrainError, match=r"batch.size=6 cannot be split evenly over 4 .* set recipe.batch.size=4 or 8"
    ):
        plan_training(spec, recipe, device="cpu", n_processes=4)
    plan = plan_training(spec, recipe, device="cpu", n_processes=2)
    assert (plan.process_batch, plan.micro_batch, plan.accumulation) == (3, 3, 1)


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 1)], ids=["one process", "1, 2, 1, ... processes"])
def test_a_run_stopped_25_times(
    spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """Bit-equal where one process did all of it; within 1e-5 where the number of processes changed."""
    dice = random.Random(11)
    many = recipe.model_copy(update={"steps": 40, "batch": recipe.batch.model_copy(update={"micro": 3})})
    whole = train(spec, many, out=tmp_path / "whole", device="cpu").folder
    stops = [dice.choice([0.5, 1, 1, 1.5, 2, 2.5]) for _ in range(25)]
    segments = [(sizes[i % len(sizes)], free_port(), stop) for i, stop in enumerate([*stops, None])]
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {"architecture": dump_yaml(spec), "recipe": many.model_dump(mode="json"), "segments": segments}
        )
    )
    worker = [sys.executable, str(HERE / "interrupted_worker.py")]
    processes = [
        subprocess.Popen(
            [*worker, str(rank), str(tmp_path)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for rank in range(max(sizes))
    ]
    try:
        for process in processes:
            finished(process)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(list(tmp_path.glob("segment-*"))) > 20
    assert load_run(tmp_path / "run").step == 40
    if max(sizes) == 1:
        assert all(
            torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path / "run").items()
        )
    else:
        assert_close(weights(tmp_path / "run"), weights(whole), rtol=0, atol=1e-5)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)


def child_of_rank(parent: int, rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if is_child and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun has no child of rank {rank}")


def test_small_layers_share_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        torch.nn.Linear(4, width, bias=False) for width in (2, 2, 2, 9, 1, 2)
    ]  # 32, 32, 32, 144, 16, 32 bytes

    def sizes(smallest: int) -> list[int]:
        monkeypatch.setattr(parallel, "SMALLEST_UNIT", smallest)
        units = parallel._units(layers)
        assert [layer for unit in units for layer in unit] == layers
        return [len(unit) for unit in units]

    assert sizes(1) == [1, 1, 1, 1, 1, 1]
    assert sizes(40) == [2, 2, 2]
    assert sizes(64) == [2, 4]  # what is left is too small to stand alone
    assert sizes(10**6) == [6]
