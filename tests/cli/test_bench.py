"""`bench step` measures what it is told to; how long it takes is nobody's test."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from moeut_kernels.bench.tune import Trial
from moeut_kernels.tuned_tiles import Setting
from typer.testing import Result

from tests.conftest import ROOT


def test_two_models_are_measured_alike(cli_json: Callable[..., Any]) -> None:
    sizes = ["--batch", "2", "--seq-len", "16", "--micro-batch", "1", "--steps", "1", "--device", "cpu"]
    timings = cli_json("bench", "step", "dense_tiny", "moeut_tiny", *sizes)
    assert [timing["name"] for timing in timings] == ["dense_tiny", "moeut_tiny"]
    for timing in timings:
        assert (timing["batch"], timing["seq_len"], timing["micro_batch"]) == (2, 16, 1)
        assert timing["ms_low"] <= timing["ms"] <= timing["ms_high"]
        assert timing["precision"] == "fp32"
        assert not timing["compiled"]
        assert not timing["graphed"]
        assert timing["peak_gib"] is None
        assert timing["loss"] > 0


def test_back_ends_take_turns_and_train_alike(cli_json: Callable[..., Any]) -> None:
    sizes = ["--batch", "1", "--seq-len", "16", "--steps", "2", "--device", "cpu"]
    timings = cli_json("bench", "step", "moeut_tiny", "--backend", "grouped_mm,loop,loop_indexed", *sizes)
    assert [timing["backend"] for timing in timings] == ["grouped_mm", "loop", "loop_indexed"]
    assert timings[1]["loss"] == pytest.approx(timings[0]["loss"], rel=1e-5)
    assert timings[2]["loss"] == pytest.approx(timings[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--backend", "auto,spiral"],
            "--backend spiral: choose among auto, triton, grouped_mm, bmm, torch, loop",
        ),
        (["--backend", "loop", "--compile"], "leave out --compile"),
    ],
)
def test_back_ends_that_cannot_be_timed(cli: Callable[..., Result], options: list[str], message: str) -> None:
    result = cli("bench", "step", "moeut_tiny", "--device", "cpu", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_kernels_are_compared(cli: Callable[..., Result], cli_json: Callable[..., Any]) -> None:
    sizes = ["--tokens", "16", "--repeats", "1", "--device", "cpu"]
    document = cli_json("bench", "kernels", *sizes)
    assert document["shape"]["name"] == "tiny"
    assert document["shape"]["n_tokens"] == 16
    statuses = {result["implementation"]: result["status"] for result in document["results"]}
    assert statuses["moeut_kernels grouped_mm"] == statuses["loop"] == "timed"
    result = cli("bench", "kernels", *sizes)
    assert result.exit_code == 0, result.stderr
    assert all(name in result.stdout for name in ("to the first", "scattermoe", "megablocks", "sonic-moe"))


def test_shapes_have_names(cli: Callable[..., Result]) -> None:
    result = cli("bench", "kernels", "--shape", "huge", "--device", "cpu")
    assert result.exit_code == 2
    assert "--shape huge: choose one of tiny, 244m, 1b" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "--device", "cpu"], "error: --tune needs a CUDA device"),
        (["--tune", "--products", "walk,jump"], "error: --products jump: choose among gather, "),
        (["--tune", "--shape", "244m"], "error: --tune has a shape of its own; leave out --shape"),
        (["--products", "walk"], "error: --products goes with --tune"),
    ],
)
def test_what_cannot_be_tuned(cli: Callable[..., Result], options: list[str], message: str) -> None:
    result = cli("bench", "kernels", *options, "--json")
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stdout == ""


TRIALS = [
    Trial("walk", (64, 128, 0, 4, 4), "static", 1.0, (0.99, 1.01), 0.0),
    Trial("walk", (128, 64, 0, 4, 3), "wins", 0.8, (0.79, 0.81), 1e-5),
    Trial("walk", (64, 256, 0, 8, 3), "did not fit", why="out of resource: shared memory"),
]


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """A GPU that is not there, and a tuner that returns what it is told; its calls."""
    calls: list[tuple[Any, ...]] = []

    def tune_device(products: list[str], *, n_tokens: int, repeats: int, tell: Callable[[str], None]) -> Any:
        calls.append((products, n_tokens, repeats))
        for trial in TRIALS:
            tell(trial.status)
        return tmp_path / "tiles.json", TRIALS

    setting = Setting("Pretend GPU", "2.11", "3.6", "0123456789ab")
    monkeypatch.setattr("moeut_compose.train.device.choose_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.device", lambda place: nullcontext())
    monkeypatch.setattr("moeut_kernels.bench.tune.tune_device", tune_device)
    monkeypatch.setattr("moeut_kernels.tuned_tiles.setting_of", lambda place: setting)
    monkeypatch.delenv("MOEUT_KERNELS_TUNED", raising=False)
    return calls


def test_tuning_is_shown(cli: Callable[..., Result], tuner: list[tuple[Any, ...]], tmp_path: Path) -> None:
    result = cli(
        "bench", "kernels", "--tune", "--products", "walk,walk", "--tokens", "4096", "--repeats", "7"
    )
    assert result.exit_code == 0, result.stderr
    assert tuner == [(["walk"], 4096, 7)]
    lines = result.stdout.splitlines()
    assert lines[0] == "Pretend GPU; 4096 tokens"
    assert lines[3].split()[-5:] == ["wins", "0.8", "0.79-0.81", "0.800", "1.0e-05"]
    assert lines[4].split()[-7:] == ["did", "not", "fit", "–", "–", "–", "–"]
    assert "tuning: 3/" in result.stderr
    assert f"1 of 1 products have a faster tile; written to {tmp_path / 'tiles.json'}" in result.stderr


def test_tuning_as_json(
    cli_json: Callable[..., Any], tuner: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = cli_json("bench", "kernels", "--tune")
    assert tuner[0][1:] == (32768, 20)
    assert set(tuner[0][0]) >= {"gather", "walk", "weight", "pair_narrow", "pair_wide"}
    assert (document["device"], document["torch"], document["triton"]) == ("Pretend GPU", "2.11", "3.6")
    assert document["file"].endswith("tiles.json")
    assert [trial["status"] for trial in document["trials"]] == ["static", "wins", "did not fit"]
    assert document["trials"][1]["tile"] == [128, 64, 0, 4, 3]


def test_tuning_says_that_its_file_will_not_be_read(
    cli: Callable[..., Result], tuner: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEUT_KERNELS_TUNED", "0")
    assert "warning: MOEUT_KERNELS_TUNED is off" in cli("bench", "kernels", "--tune").stderr


def test_layers_that_do_not_fit_the_gpu(
    cli: Callable[..., Result], tuner: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moeut_kernels.bench.tune.tune_device", fill)
    result = cli("bench", "kernels", "--tune")
    assert result.exit_code == 1
    assert (
        "error: the layers do not fit the memory of this GPU at 32768 tokens; try --tokens" in result.stderr
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [(["--tune"], 1, "needs a CUDA device"), (["--tune", "jump"], 2, "--tune jump: choose among gather")],
)
def test_the_library_tunes_gpus_only(words: list[str], code: int, message: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    line = [sys.executable, "-m", "moeut_kernels.bench", *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_graph_needs_a_gpu(cli: Callable[..., Result]) -> None:
    result = cli("bench", "step", "dense_tiny", "--cuda-graph", "--device", "cpu")
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.stderr


def test_decoding_is_measured_beside_its_bound(cli_json: Callable[..., Any]) -> None:
    sizes = ["--batch", "1,3", "--tokens", "32", "--prompt-tokens", "4", "--device", "cpu"]
    small = cli_json("bench", "decode", "moeut_tiny", *sizes)
    assert [(timing["batch"], timing["dtype"], timing["is_graphed"]) for timing in small] == [
        (1, "float32", False),
        (3, "float32", False),
    ]
    for timing in small:
        assert timing["step_ms_low"] <= timing["step_ms"] <= timing["step_ms_high"]
        assert timing["is_fused"]
        assert timing["bound_tokens_per_second"] is None
    # one token reads 2 of 4 attention experts a head and 8 of 96 others, three applications of each layer
    layer = 2 * 128 * 128 + 2 * 16 * 128 + 4 * 128 + 8 * 2 * 128 * 32 + 96 * 128 + 8 * 2 * 128 * 32
    assert small[0]["weight_bytes"] == 4 * (6 * layer + 2048 * 128 + 2048 + 2 * 128 + 128)
    assert small[0]["cache_bytes"] == 4 * 6 * 2 * 128 * (4 + 16)


def test_decoding_for_people(cli: Callable[..., Result]) -> None:
    sizes = ["--batch", "2", "--tokens", "32", "--prompt-tokens", "4", "--device", "cpu"]
    result = cli("bench", "decode", "dense_tiny", "sut_tiny", "stages.0.repeats=1", *sizes)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["dense_tiny", "fused", "2"],
        ["sut_tiny", "modules", "2"],
    ]
    assert all(line.endswith("n/a       n/a") for line in lines[2:])


def test_batches_are_numbers(cli: Callable[..., Result]) -> None:
    result = cli("bench", "decode", "moeut_tiny", "--batch", "1,x")
    assert result.exit_code == 2
    assert "--batch 1,x" in result.stderr


def test_bench_step_of_two_processes_counts_the_tokens_of_both() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    words = [
        "d_model=32",
        "--batch",
        "2",
        "--seq-len",
        "16",
        "--steps",
        "2",
        "--parallelism",
        "fsdp",
        "--json",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "moeut_compose", "bench", "step", "moeut_tiny", "--device", "cpu", *words],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (timing,) = json.loads(done.stdout)
    assert timing["n_processes"] == 2
    assert timing["tokens_per_second"] == pytest.approx(2 * 2 * 16 * 1e3 / timing["ms"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--parallelism", "tp"], "write ddp or fsdp"),
        (["--parallelism", "fsdp", "--cuda-graph"], "splits them"),
    ],
)
def test_bench_step_refuses(cli, words: list[str], says: str) -> None:
    result = cli("bench", "step", "moeut_tiny", *words)
    assert result.exit_code == 2
    assert says in result.stderr
