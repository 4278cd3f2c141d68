"""Benchmarks from Hugging Face datasets: fetched once, read like the original files, one clear error offline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.data.hub import import_datasets
from moeut_compose.evaluate.tasks import TASKS, hub
from moeut_compose.evaluate.tasks.hub import HUB_BENCHMARKS, fetch_benchmarks
from moeut_compose.evaluate.tasks.items import Choice, LastWord
from tests.conftest import ROOT

ROWS: dict[str, dict[str, Any]] = {
    "lambada": {"text": "she said yes"},
    "blimp": {"sentence_good": "Cats are here.", "sentence_bad": "Cats is here.", "UID": "agreement"},
    "hellaswag": {
        "ind": 4, "activity_label": "Rowing", "ctx_a": "Two men row.", "ctx_b": "they", "ctx": "…",
        "endings": ["sink", "win", "sing", "stop"], "label": "1",
    },
    "piqa": {"goal": "boil water", "sol1": "use a sieve", "sol2": "use a kettle", "label": 1},
    "arc_easy": {
        "id": "q", "question": "What is wet?", "answerKey": "C",
        "choices": {"text": ["sand", "salt", "water", "air"], "label": ["A", "B", "C", "D"]},
    },
}  # fmt: skip
ITEMS = {
    "lambada": LastWord("she said yes"),
    "blimp": Choice("", ("Cats are here.", "Cats is here."), 0, group="agreement"),
    "hellaswag": Choice("Rowing: Two men row. They", ("sink", "win", "sing", "stop"), 1),
    "piqa": Choice("Question: boil water\nAnswer:", ("use a sieve", "use a kettle"), 1),
    "arc_easy": Choice("Question: What is wet?\nAnswer:", ("sand", "salt", "water", "air"), 2),
}


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Datasets of one row in folders that `datasets` opens, with configurations and the network switched off."""
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(import_datasets().config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for task, row in ROWS.items():
        benchmark = HUB_BENCHMARKS[task]
        folder = tmp_path / "hub" / task
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        config = ["agreement"] if task == "blimp" else benchmark.configs
        names = [{"config_name": name or "default"} for name in config]
        files = {"data_files": [{"split": benchmark.split, "path": "rows.jsonl"}]}
        (folder / "README.md").write_text(
            f"---\n{json.dumps({'configs': [name | files for name in names]})}\n---\n"
        )
        local = hub.HubBenchmark(str(folder), benchmark.split, benchmark.lines, config)
        monkeypatch.setitem(HUB_BENCHMARKS, task, local)
    return tmp_path


@pytest.mark.parametrize("task", ROWS)
def test_rows_become_the_items_of_the_original_files(local_hub: Path, task: str) -> None:
    folder = fetch_benchmarks([task])[task]
    assert list(TASKS[task].read_published(folder)) == [ITEMS[task]]


def test_what_was_fetched_needs_no_hub(local_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_benchmarks(ROWS)
    monkeypatch.setattr(hub, "import_datasets", None)
    assert fetch_benchmarks(ROWS) == first
    assert sorted(path.name for path in (local_hub / "cache" / "benchmarks").iterdir()) == sorted(ROWS)


def test_a_failure_in_the_middle_leaves_nothing(local_hub: Path) -> None:
    (local_hub / "hub" / "piqa" / "rows.jsonl").write_text('{"goal": "boil water"}\n')
    with pytest.raises(DataError, match="other columns than expected: goal"):
        fetch_benchmarks(["piqa"])
    assert list((local_hub / "cache" / "benchmarks").iterdir()) == []


def test_cbt_has_no_hub(local_hub: Path) -> None:
    with pytest.raises(DataError, match="cbt is not read from the Hugging Face hub"):
        fetch_benchmarks(["lambada", "cbt"])


def test_offline_names_the_ways_out(tmp_path: Path) -> None:
    """In a process of its own, because `datasets` decides at import whether it is offline."""
    code = (
        "from moeut_compose.data.errors import DataError\n"
        "from moeut_compose.evaluate.tasks.hub import fetch_benchmarks\n"
        "try: fetch_benchmarks(['blimp'])\n"
        "except DataError as error: print(error)\n"
    )
    changes = {
        "HF_ENDPOINT": "http://127.0.0.1:9",  # where nothing listens
        "HF_HOME": str(tmp_path / "hf"),
        "MOEUT_COMPOSE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | changes
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot read the dataset nyu-mll/blimp for blimp:")
    assert all(
        way in done.stdout for way in ("--task-data DIR", "docs/evaluation.md", str(tmp_path / "cache"))
    )
