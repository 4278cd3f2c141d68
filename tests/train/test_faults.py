"""Whatever stops a run, wherever it is: what was saved stays, and the same command ends in the same bits.

The matrix is that of `docs/reliability.md`. Processes are real and so are their signals; a full disk, a refused access
and a failing one are what the system call would raise.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeut_compose.spec.io import dump_yaml
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train.checkpoint import open_checkpoint
from moeut_compose.train.metrics import read_rows

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
DISK = ("disk full", "no permission", "input/output error")
COMPUTING = (
    "building the model",
    "the first step",
    "between micro-batches",
    "clipping",
    "the update",
    "evaluating",
)
PREPARING = ("training the tokenizer", "keeping the tokenizer", "tokenising", "publishing tokens")
WRITING = (
    *PREPARING,
    "writing the run folder",
    "writing metrics",
    "writing weights",
    "writing the training state",
    "publishing a checkpoint",
    "moving the pointer",
    "pruning",
    "drawing",
)
MATRIX = [(phase, fault) for phase in COMPUTING for fault in SIGNALS]
MATRIX += [(phase, fault) for phase in WRITING for fault in (*SIGNALS, *DISK)]


class Server:
    """The forking process."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fault_worker.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, out: Path, phase: str = "", fault: str = "") -> tuple[int, str]:
        """Exit status and what was said."""
        errors = folder / "errors.txt"
        words = [
            "train",
            str(folder / "a.yaml"),
            "--recipe",
            str(folder / "r.yaml"),
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        order = {"words": words, "phase": phase, "fault": fault, "errors": str(errors), "out": str(out)}
        order["cache"] = str(folder / "cache")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), errors.read_text()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def folder(spec: ModelSpec, recipe: RecipeSpec, tmp_path: Path) -> Path:
    checkpoint = recipe.checkpoint.model_copy(update={"interval": 3, "keep_last": 9})
    evaluation = recipe.evaluation.model_copy(update={"interval": 4, "sample_tokens": 2})
    (tmp_path / "a.yaml").write_text(dump_yaml(spec))
    (tmp_path / "r.yaml").write_text(
        dump_yaml(recipe.model_copy(update={"checkpoint": checkpoint, "evaluation": evaluation}))
    )
    return tmp_path


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Filled by the first test: every test has the same architecture, text and recipe."""
    return {}


def outcome(run: Path) -> dict[str, object]:
    rows = [
        {
            key: value
            for key, value in row.items()
            if key not in ("tokens_per_second", "memory_bytes", "mfu", "data_wait")
        }
        for row in read_rows(run / "metrics.jsonl")
    ]
    return {"weights": load_file(run / "checkpoints" / "step-00000008" / "model.safetensors"), "rows": rows}


@pytest.mark.parametrize(
    ("phase", "fault"), MATRIX, ids=[f"{fault} while {phase}" for phase, fault in MATRIX]
)
def test_nothing_saved_is_lost_and_the_run_goes_on(
    server: Server, folder: Path, expected: dict, phase: str, fault: str
) -> None:
    first = not expected
    if first:
        assert server.run(folder, folder / "whole")[0] == 0
        expected.update(outcome(folder / "whole"), cache=folder / "cache")
    if phase not in PREPARING and not first:
        (folder / "cache").symlink_to(expected["cache"])
    out = folder / "run"
    status, said = server.run(folder, out, phase, fault)
    struck = folder / "errors.txt.struck"
    assert struck.is_file(), f"the fault has not struck: {said}"
    assert "Traceback" not in said
    if fault in SIGNALS:
        assert status in ({SIGNALS[fault]} if phase != "drawing" or fault == "SIGKILL" else {0}), said
    else:
        assert status == 1, said
        assert "error: " in said
    for name in json.loads(struck.read_text()):
        assert open_checkpoint(out / "checkpoints" / name).step == int(name.removeprefix("step-"))
    status, said = server.run(folder, out)
    assert status == 0, said
    ended = outcome(out)
    assert ended["rows"] == expected["rows"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in ended["weights"].items())
    assert not list((out / "checkpoints").glob(".*")), "nothing unfinished is left"


def test_the_documentation_shows_this_matrix() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert {phase for phase, _ in MATRIX} <= set(rows)
    for phase, fault in MATRIX:
        column = [cell.strip() for cell in rows["while"].split("|")].index(fault)
        assert rows[phase].split("|")[column].strip() not in ("", "–"), (phase, fault)
    assert len(MATRIX) >= 40
