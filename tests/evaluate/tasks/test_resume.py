"""A benchmark that is killed goes on where it was, to the same result."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moeut_compose.evaluate import zero_shot
from moeut_compose.evaluate.tasks.items import Choice, LastWord
from moeut_compose.evaluate.zero_shot import by_length, evaluate_tasks
from moeut_compose.progress import SilentReporter
from tests.conftest import ROOT
from tests.evaluate.tasks.conftest import SmallRun

N_PAIRS = 40
AT_ONCE = 5

KILLED = """
import os, signal, sys
from pathlib import Path
from moeut_compose.evaluate import zero_shot
from tests.evaluate.tasks.conftest import Bigrams, Pieces, SmallRun
from tests.evaluate.tasks.test_resume import AT_ONCE, PROBABILITIES, Watching

zero_shot.ITEMS_AT_ONCE = AT_ONCE
folder, files = map(Path, sys.argv[1:])
pieces = Pieces()
run = SmallRun(folder, Bigrams(pieces, PROBABILITIES), pieces)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
zero_shot.evaluate_tasks(run, ["blimp"], files, protocol="harness", reporter=Watching(23, die))
"""
PROBABILITIES = {"▁is": {"▁it": 0.5, "▁up": 0.2}, "▁it": {"▁is": 0.3}}


class Watching(SilentReporter):
    """Calls `action` once `amount` items are done, and remembers what it was told."""

    def __init__(self, amount: float = float("inf"), action=None) -> None:
        self.amount, self.action = amount, action
        self.notes: list[str] = []
        self.began = 0.0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def task(self, title: str, *, total: float | None, done: float = 0):
        self.began = done
        return _Counting(self, done)


class _Counting:
    def __init__(self, reporter: Watching, done: float) -> None:
        self.reporter, self.done = reporter, done

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, n: float = 1, *, detail: str = "") -> None:
        self.done += n
        if self.done >= self.reporter.amount:
            self.reporter.action()


@pytest.fixture
def pairs(files: Path) -> Path:
    (files / "blimp").mkdir()
    words = ["is", "it", "up", "an"]
    lines = [
        {"sentence_good": " ".join(words[: 1 + i % 4] * (1 + i % 3)), "sentence_bad": f"{words[i % 4]} up"}
        for i in range(N_PAIRS)
    ]
    for name, part in (("a", lines[: N_PAIRS // 2]), ("b", lines[N_PAIRS // 2 :])):
        (files / "blimp" / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in part))
    return files


@pytest.fixture
def killed(tmp_path: Path, pairs: Path) -> Path:
    """The folder of a run whose process was killed after a little more than half of BLiMP."""
    folder = tmp_path / "killed"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(pairs)], env=environment, check=False, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def go_on(make_run, pairs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero_shot, "ITEMS_AT_ONCE", AT_ONCE)
    run = make_run(PROBABILITIES)

    def go(folder: Path, **changes: object):
        again = SmallRun(folder, run.model, run.tokenizer, **changes)
        folder.mkdir(exist_ok=True)
        reporter, before = Watching(), len(run.model.shapes)
        (result,) = evaluate_tasks(again, ["blimp"], pairs, protocol="harness", reporter=reporter)
        return replace(result, seconds=0.0), reporter, len(run.model.shapes) - before

    return go


def test_a_killed_benchmark_goes_on(killed: Path, go_on, tmp_path: Path) -> None:
    assert [path.name for path in (killed / "evaluation").iterdir()] == ["blimp-harness.partial.jsonl"]
    result, reporter, n_passes = go_on(killed)
    assert reporter.began == 20
    assert reporter.notes == ["BLiMP: going on after 20 of 40 items"]
    whole, _, n_passes_of_whole = go_on(tmp_path / "whole")
    assert result == whole
    assert 0 < n_passes < n_passes_of_whole
    assert [path.name for path in (killed / "evaluation").iterdir()] == ["blimp-harness.json"]


def test_a_torn_line_is_done_again(killed: Path, go_on, tmp_path: Path) -> None:
    path = killed / "evaluation" / "blimp-harness.partial.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    result, reporter, _ = go_on(killed)
    assert reporter.began == 15
    assert result == go_on(tmp_path / "whole")[0]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "null", '{"verdicts": [[0]], "seconds": 1}', '{"verdicts": [[0, 1, {}]]}']
)
def test_lines_of_anything_else_are_done_again(killed: Path, go_on, tmp_path: Path, line: str) -> None:
    path = killed / "evaluation" / "blimp-harness.partial.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *rest]) + "\n")
    result, reporter, _ = go_on(killed)
    assert reporter.began == 0
    assert result == go_on(tmp_path / "whole")[0]


def test_another_checkpoint_starts_over(killed: Path, go_on) -> None:
    result, reporter, _ = go_on(killed, step=8)
    assert (result.identity.step, reporter.began, reporter.notes) == (8, 0, [])


def test_a_folder_that_cannot_be_written_is_no_hindrance(go_on, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "evaluation").write_text("a file where the folder should be")
    result, _, _ = go_on(folder)
    assert result == go_on(tmp_path / "open")[0]


def test_items_are_dealt_out_by_length() -> None:
    items = [
        LastWord("a b"),
        Choice("", ("abcdef", "a"), 0),
        LastWord("a bcdef"),
        Choice("ab", ("", "abcd"), 0),
    ]
    assert by_length(items) == [2, 1, 3, 0]
