"""`sanitize.py` runs all tools, and only silence of all is a success."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import sanitize


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a run under each tool returns; a run takes its number away."""
    codes: dict[str, int] = {"nothing": 0, "memcheck": 0, "racecheck": 0, "initcheck": 0}

    def run(line: list[str], *, env: dict[str, str], cwd: Path, check: bool) -> SimpleNamespace:
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert (cwd / "pyproject.toml").is_file()
        tool = line[line.index("--tool") + 1] if "--tool" in line else "nothing"
        return SimpleNamespace(returncode=codes.pop(tool))

    monkeypatch.setattr(sanitize, "find", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    return codes


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, 0, "under initcheck: clean"),
        ({"memcheck": sanitize.FOUND}, 1, "under memcheck: errors found"),
        ({"racecheck": sanitize.FOUND}, 1, "under memcheck: clean\nunder racecheck: errors found"),
        ({"racecheck": 255}, 1, "under racecheck: failed (255)"),
        ({"initcheck": sanitize.FOUND}, 1, "under initcheck: errors found"),
    ],
)
def test_all_tools_run_to_their_end(
    runs: dict[str, int], capsys: pytest.CaptureFixture[str], changes: dict, code: int, said: str
) -> None:
    runs.update(changes)
    assert sanitize.main([]) == code
    assert said in capsys.readouterr().out
    assert not runs


def test_tests_that_fail_without_a_tool_are_not_watched(runs: dict[str, int]) -> None:
    runs["nothing"] = 1
    assert sanitize.main([]) == 1
    assert set(runs) == set(sanitize.TOOLS)


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    assert sanitize.find() != str(program), "it cannot be executed"
    program.chmod(0o755)
    assert sanitize.find() == str(program)
    assert sanitize.main([]) == 2
    monkeypatch.setenv("COMPUTE_SANITIZER", str(tmp_path / "none"))
    assert sanitize.find() is None
    assert sanitize.main([]) == 2
