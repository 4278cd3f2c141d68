"""Hugging Face datasets: read through `datasets`, and one clear error where there is no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.data.sources import open_source
from moeut_compose.spec.recipe import HuggingFaceData


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceData:
    """A dataset that `datasets` opens from files, with the network switched off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for split in ("train", "validation"):
        lines = [json.dumps({"content": f"{split} {i}"}) for i in range(30)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "validation")}
    return HuggingFaceData(dataset="json", data_files=files, field="content")


def test_splits_in_file_order(local_dataset: HuggingFaceData) -> None:
    source = open_source(local_dataset)
    assert list(source.documents("train")) == [f"train {i}" for i in range(30)]
    assert list(source.documents("validation")) == [f"validation {i}" for i in range(30)]
    assert source.is_remote


def test_documents_are_held_out_without_a_validation_split(local_dataset: HuggingFaceData) -> None:
    source = open_source(
        local_dataset.model_copy(update={"validation_split": None, "validation_fraction": 0.3})
    )
    train, held_out = list(source.documents("train")), list(source.documents("validation"))
    assert sorted(train + held_out) == sorted(f"train {i}" for i in range(30))
    assert held_out


def test_a_missing_column_is_named(local_dataset: HuggingFaceData) -> None:
    source = open_source(local_dataset.model_copy(update={"field": "text"}))
    with pytest.raises(DataError, match=r"no column 'text' \(found: content\); set data\.field"):
        next(source.documents("train"))


def test_offline_names_the_ways_out(tmp_path: Path) -> None:
    """In a process of its own, because `datasets` decides at import whether it is offline."""
    code = (
        "from moeut_compose.data.errors import DataError\n"
        "from moeut_compose.data.sources import open_source\n"
        "from moeut_compose.spec.recipe import HuggingFaceData\n"
        "source = open_source(HuggingFaceData(dataset='allenai/c4', config='en'))\n"
        "try: next(source.documents('train'))\n"
        "except DataError as error: print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    # an endpoint where nothing listens: no name is looked up and no packet leaves the machine
    changes = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
    }
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | changes
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot read the dataset allenai/c4 (en):")
    assert all(way in done.stdout for way in ("built-in corpus", "kind: text", "kind: jsonl", "HF_HOME"))
