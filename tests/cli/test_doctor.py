"""`doctor` tells what will run, and fails where it would compute nonsense."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moeut_kernels
import pytest
import torch
from moeut_kernels import tuned_tiles
from moeut_kernels.tuned_tiles import Tuned
from typer.testing import Result

from moeut_compose import __version__
from moeut_compose.cli.doctor import _describe_tiles, _tuned_tiles
from tests.conftest import ROOT

FILE = Path("/cache/tiles.json")
WALK = (128, 64, 0, 4, 3)


def test_the_report(cli_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "cache"))
    report = cli_json("doctor")
    assert report["versions"]["moeut-compose"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert report["backends"]["cpu"]["backend"] == "grouped_mm"
    assert report["backends"]["cpu"]["why"].startswith("auto")
    if not torch.cuda.is_available():
        assert report["backends"]["cuda"] == {"backend": "none", "why": "no CUDA device is available"}
    assert len(report["tuned_tiles"]) == torch.cuda.device_count()
    assert report["variables"]["MOEUT_COMPOSE_CACHE"] == str(tmp_path / "cache")
    assert report["variables"]["MOEUT_COMPOSE_BACKEND"] is None
    assert report["cache"] == {"path": str(tmp_path / "cache"), "exists": False, "writable": True}
    on_cpu = [check for check in report["checks"] if check["device"] == "cpu"]
    assert [check["backend"] for check in on_cpu] == ["torch", "grouped_mm", "bmm"]
    assert all(check["ok"] and 0 < check["error"] < 1e-5 for check in on_cpu)
    assert not (tmp_path / "cache").exists(), "looking changes nothing"


def test_people_read_lines(cli: Callable[..., Result]) -> None:
    result = cli("doctor")
    assert result.exit_code == 0
    for text in ("moeut-compose", "grouped_mm (auto", "MOEUT_COMPOSE_RUNS", "torch on cpu", "ok (relative"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("found", "switch", "in_use", "line"),
    [
        (Tuned(FILE, {}), "1", False, "static (`moeut-compose bench kernels --tune` looks for faster ones)"),
        (Tuned(FILE, {"walk": WALK, "weight": WALK}), "", True, f"tuned for walk, weight, from {FILE}"),
        (Tuned(FILE, {"walk": WALK}), "0", False, f"static; MOEUT_KERNELS_TUNED is off, {FILE} is not read"),
        (Tuned(FILE, {}, "it is torn"), "1", False, f"static; {FILE} is ignored: it is torn"),
    ],
)
def test_tuned_tiles_are_named(
    monkeypatch: pytest.MonkeyPatch, found: Tuned, switch: str, in_use: bool, line: str
) -> None:
    monkeypatch.setenv("MOEUT_KERNELS_TUNED", switch)
    monkeypatch.setattr(tuned_tiles, "look_up", lambda device: found)
    entry = _tuned_tiles("cuda:0")
    assert (entry["device"], entry["file"], entry["in_use"]) == ("cuda:0", str(FILE), in_use)
    assert entry["products"] == list(found.tiles)
    assert _describe_tiles(entry) == line


def test_a_wrong_product_fails_the_check(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    right = moeut_kernels.expert_feedforward

    def wrong(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        factor = 1.01 if moeut_kernels.backend() == "grouped_mm" else 1.0
        return right(x, *arguments, **options) * factor

    monkeypatch.setattr(moeut_kernels, "expert_feedforward", wrong)
    result = cli("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the self-check failed: grouped_mm on cpu")
    assert "WRONG (relative error" in result.stdout


def test_a_crash_fails_the_check(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setattr(moeut_kernels, "expert_feedforward", crash)
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    checks = json.loads(result.stdout)["checks"]
    assert [check["message"] for check in checks[:2]] == ["no kernel image"] * 2


@pytest.mark.parametrize(
    ("backend", "code", "shown"),
    [("torch", 0, "torch (MOEUT_COMPOSE_BACKEND=torch)"), ("fast", 1, "'fast' is not one of auto, triton")],
)
def test_the_environment_is_obeyed(tmp_path: Path, backend: str, code: int, shown: str) -> None:
    """In a process of its own, because the variable is read once."""
    environment = os.environ | {
        "MOEUT_COMPOSE_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
    }
    done = subprocess.run(
        [sys.executable, "-m", "moeut_compose", "doctor"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
