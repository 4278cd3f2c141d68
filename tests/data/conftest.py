"""A corpus small enough to tokenise in every test."""

import json
import random
from pathlib import Path

import pytest

NAMES = ["Ishmael", "Queequeg", "Ahab", "Starbuck", "Stubb", "Flask"]
VERBS = ["sees", "follows", "hunts", "remembers", "fears"]
THINGS = ["the whale", "an albatross", "7 boats", "the sea", "a doubloon", "the mast"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(folder))
    return folder


@pytest.fixture
def documents() -> list[str]:
    dice = random.Random(1)
    sentences = [
        f"{dice.choice(NAMES)} {dice.choice(VERBS)} {dice.choice(THINGS)} in {dice.randrange(1700, 1900)}."
        for _ in range(2000)
    ]
    return ["\n".join(sentences[i : i + 20]) for i in range(0, len(sentences), 20)]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path
