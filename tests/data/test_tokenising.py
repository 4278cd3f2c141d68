"""The same tokens whatever the workers, the shards and the interruptions; and nothing is left running or lying about."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeut_compose.data import encoding, tokenising
from moeut_compose.data.errors import DataError
from moeut_compose.data.journal import JOURNAL, sole_writer
from moeut_compose.data.shards import StreamShard
from moeut_compose.data.sources import JsonlSource
from moeut_compose.data.tokenizer import Tokenizer, train_tokenizer, with_separator
from moeut_compose.data.tokens import TokenIndex, open_tokens, write_tokens
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.recipe import TrainSentencePiece

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
TEXTS = st.lists(st.text(alphabet="ab 7é\ud800鯨\n", max_size=40), max_size=30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"Ishmael sees the whale {i} in {i % 7} boats, and an albatross." for i in range(400)]
    return train_tokenizer(TrainSentencePiece(), with_separator(texts, "|"), vocab_size=90)


class Stopped(Exception):
    """Where a signal would strike."""


class Stopping(SilentReporter):
    """Ends the work after so many chunks."""

    def __init__(self, n_chunks: int) -> None:
        self._left = n_chunks

    @contextmanager
    def task(self, title, *, total, done=0):
        yield self

    def advance(self, n=1, *, detail="") -> None:
        if self._left == 0:
            raise Stopped
        self._left -= 1


def shards_of(documents: list[str], cuts: list[int]) -> list[StreamShard]:
    borders = [0, *sorted(cuts), len(documents)]
    pieces = [documents[a:b] for a, b in pairwise(borders)]
    return [StreamShard(lambda piece=piece: piece) for piece in pieces]


def expected(documents: list[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> list[int]:
    texts = with_separator(documents, "|")
    return [token for text in texts for token in tokenizer.encode(text)][:max_tokens]


@settings(max_examples=80, deadline=None)
@given(
    documents=TEXTS,
    cuts=st.lists(st.integers(0, 30), max_size=4),
    size=st.integers(1, 120),
    journal=st.integers(2, 60),
    max_tokens=st.none() | st.integers(1, 200),
    stops=st.lists(st.integers(0, 6), max_size=4),
)
def test_interrupted_anywhere_the_tokens_are_those_of_one_reading(
    tokenizer, documents, cuts, size, journal, max_tokens, stops
) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "_CHUNK_CHARACTERS", size)
        patch.setattr(tokenising, "_JOURNAL_BYTES", journal)
        folder = Path(place) / "tokens"
        shards = shards_of(documents, [min(cut, len(documents)) for cut in cuts])
        for n_chunks in stops:
            try:
                write_tokens(
                    folder,
                    shards,
                    tokenizer,
                    separator="|",
                    max_tokens=max_tokens,
                    reporter=Stopping(n_chunks),
                )
            except Stopped:
                continue
            break
        write_tokens(folder, shards, tokenizer, separator="|", max_tokens=max_tokens)
        tokens = open_tokens(folder)
        assert tokens.ids.tolist() == expected(documents, tokenizer, max_tokens)
        whole = Path(place) / "whole"
        write_tokens(whole, [StreamShard(lambda: documents)], tokenizer, separator="|", max_tokens=max_tokens)
        assert open_tokens(whole).index == tokens.index
        assert sorted(p.name for p in folder.iterdir()) == ["index.json", "tokens.bin"]
        assert sorted(p.name for p in folder.parent.iterdir()) == ["tokens", "whole"]
        del tokens


@pytest.mark.parametrize("workers", [1, 2, 3, "auto"])
def test_the_number_of_workers_changes_no_token(
    tokenizer, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers
) -> None:
    monkeypatch.setattr(tokenising, "_CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(encoding, "_WORTH_CHARACTERS", 9000)
    monkeypatch.setattr(encoding, "usable_cpus", lambda: 2)
    documents = [*documents, "", "鯨 \ud800", "long " * 5000]
    write_tokens(tmp_path / "t", shards_of(documents, [40]), tokenizer, separator="|", workers=workers)
    assert open_tokens(tmp_path / "t").ids.tolist() == expected(documents, tokenizer)


def test_a_small_text_starts_no_worker(
    tokenizer, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "Worker", None)
    monkeypatch.setattr(tokenising, "_CHUNK_CHARACTERS", 3000)
    write_tokens(tmp_path / "t", shards_of(documents, []), tokenizer, separator="|")
    assert open_tokens(tmp_path / "t").index.n_documents == len(documents)


def test_a_lost_worker_is_an_error_and_the_rest_ends_with_it(
    tokenizer, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "_CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(tokenising, "_JOURNAL_BYTES", 1)
    started: list[encoding.Worker] = []

    class Recorded(encoding.Worker):
        def __init__(self) -> None:
            super().__init__()
            started.append(self)

    class Killing(Stopping):
        def advance(self, n=1, *, detail="") -> None:
            with suppress(ProcessLookupError):  # it may be waited for already
                os.kill(started[0].pid, signal.SIGKILL)

    monkeypatch.setattr(encoding, "Worker", Recorded)
    folder, shards = tmp_path / "made" / "t", shards_of(documents * 3, [])
    with pytest.raises(DataError, match=r"a process that tokenises was killed by SIGKILL; .*workers lower"):
        write_tokens(folder, shards, tokenizer, separator="|", workers=2, reporter=Killing(0))
    assert len(started) == 2
    assert not any(Path(f"/proc/{worker.pid}").exists() for worker in started)
    write_tokens(folder, shards, tokenizer, separator="|", workers=1)
    assert open_tokens(folder).ids.tolist() == expected(documents * 3, tokenizer)


def test_what_a_worker_says_at_its_end_is_told(
    tokenizer, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        vocab_size, model = tokenizer.vocab_size, b"no model"

    with pytest.raises(DataError, match=r"ended with status 1: .*this is not a SentencePiece model"):
        write_tokens(tmp_path / "t", shards_of(documents, []), Broken(), workers=2)


def start(jsonl: Path, model: Path, folder: Path, workers: int) -> subprocess.Popen:
    words = [sys.executable, str(HERE / "slow_tokenising.py"), jsonl, model, folder, workers]
    return subprocess.Popen(
        [str(word) for word in words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.02)


@pytest.fixture
def model(tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "a.model")
    return tmp_path / "a.model"


@pytest.mark.slow
def test_killed_processes_leave_no_worker_and_lose_no_document(
    tokenizer, documents, jsonl: Path, model: Path, tmp_path: Path
) -> None:
    dice, folder, came_far = random.Random(5), tmp_path / "made" / "t", []
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(jsonl, model, folder, workers=2)
        assert process.stdout is not None
        pids, last = [], dice.randint(8, 30)
        for line in process.stdout:
            pids += [int(line.split()[1])] if line.startswith("worker") else []
            if line == f"at {last}\n":
                break
        time.sleep(dice.uniform(0, 0.03))
        process.send_signal(signum)
        process.stdout.close()
        assert process.wait(20) != 0
        assert len(pids) == 2
        wait_until_gone(pids)
        came_far.append(json.loads((folder.parent / ".t.part" / JOURNAL).read_text())["n_documents"])
    assert came_far == sorted(came_far)
    assert came_far[0] > 0
    assert came_far[-1] > came_far[0]
    shards = JsonlSource([jsonl] * 2, [], field="text", fraction=0.0).shards("train")
    write_tokens(folder, shards, tokenizer, separator="|")
    tokens = open_tokens(folder)
    assert tokens.ids.tolist() == expected(documents * 2, tokenizer)
    assert tokens.index.n_documents == 2 * len(documents)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["t"]


def test_two_processes_at_once_make_one_file(
    tokenizer, documents, jsonl: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "t"
    both = [start(jsonl, model, folder, workers=1) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("waiting for it" in text for text in said) == [False, True]
    assert sorted("at 3\n" in text for text in said) == [False, True]
    assert open_tokens(folder).ids.tolist() == expected(documents * 2, tokenizer)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["t"]


def test_the_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with sole_writer(tmp_path / "lock", SilentReporter()):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()


def test_without_locks_nobody_shares_an_unfinished_file(
    tokenizer, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(tokenising, "_CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(tokenising, "_JOURNAL_BYTES", 1)
    folder, shards = tmp_path / "made" / "t", shards_of(documents, [7])
    shared = folder.parent / ".t.part"
    shared.mkdir(parents=True)
    (shared / "tokens.bin").write_bytes(b"of another process")
    with pytest.raises(Stopped):
        write_tokens(folder, shards, tokenizer, separator="|", reporter=Stopping(5))
    assert [p.name for p in folder.parent.iterdir()] == [".t.part"]
    write_tokens(folder, shards, tokenizer, separator="|")
    assert open_tokens(folder).ids.tolist() == expected(documents, tokenizer)
    assert (shared / "tokens.bin").read_bytes() == b"of another process"


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "{",
        "[]",
        '{"shard": 1}',
        '{"n_tokens": 10000000, "shard": 1}',
        '{"unknown": 1}',
        '{"n_tokens": "x"}',
    ],
)
def test_a_journal_that_cannot_be_true_is_not_believed(
    tokenizer, documents, tmp_path: Path, journal: str
) -> None:
    partial = tmp_path / ".t.part"
    partial.mkdir()
    (partial / "tokens.bin").write_bytes(b"\1\2\3")
    (partial / JOURNAL).write_text(journal)
    write_tokens(tmp_path / "t", shards_of(documents, [7]), tokenizer, separator="|")
    assert open_tokens(tmp_path / "t").ids.tolist() == expected(documents, tokenizer)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """In a process that may only have 24 MiB more than it starts with, for 64 MiB of text in four formats."""
    done = subprocess.run(
        [sys.executable, str(HERE / "bounded_memory.py"), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    index = TokenIndex(**json.loads((tmp_path / "tokens" / "index.json").read_text()))
    assert index.n_bytes == 64 << 20
    ids = np.memmap(tmp_path / "tokens" / "tokens.bin", dtype=index.dtype, mode="r")
    assert len(ids) == index.n_tokens == index.n_bytes // 8
