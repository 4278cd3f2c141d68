"""Whatever is in the files that commands read, they answer: exit 0, 1 or 2, a line a problem, and nothing saved is lost.

A case is a seed: it changes one file of a spec, a sweep or a run folder and runs one command on it, in a process of
its own whose memory and time are bounded.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.conftest import drawn_text
from tests.train.mutations import mutate_run, mutate_yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SECONDS = 120
LONGEST_LINE = 1000
DEVICE = ["--device", "cpu"]
SMALL = {
    "vocab_size": 120,
    "context_length": 16,
    "d_model": 32,
    "stages.0.repeats": 2,
    "stages.0.layers.0.mixer.n_heads": 2,
    "stages.0.layers.0.mixer.d_head": 8,
    "stages.0.layers.0.feedforward.n_experts": 8,
    "stages.0.layers.0.feedforward.d_expert": 8,
    "stages.0.layers.0.feedforward.top_k": 2,
}
RECIPE = {
    "name": "small",
    "order": "shuffled",
    "batch": {"size": 2, "micro": 1},
    "steps": 4,
    "optimizer": {"kind": "adamw", "lr": 0.003},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "evaluation": {"interval": 2, "windows": 3, "sample_tokens": 3},
    "checkpoint": {"interval": 2, "keep_last": 9},
    "logging": {"interval": 1},
}
SWEEP = {
    "name": "widths",
    "architectures": ["a.yaml"],
    "recipes": ["r.yaml"],
    "changes": {"recipe.steps": 2},
    "grid": {"d_model": [32, 48], "recipe.seed": [0, 1]},
    "variants": [{"stages.0.repeats": 1}, {"stages.0.repeats": 2}],
}
SPEC_COMMANDS = (
    ["validate", "a.yaml"],
    ["show", "a.yaml", "--resolved"],
    ["show", "a.yaml", "--tree"],
    ["params", "a.yaml", "--json"],
    ["macs", "a.yaml"],
    ["memory", "a.yaml", *DEVICE],
    ["compare", "a.yaml", "dense_tiny"],
    ["train", "a.yaml", "--recipe", "r.yaml", "--dry-run", *DEVICE],
)
RECIPE_COMMANDS = (
    ["validate", "r.yaml"],
    ["show", "r.yaml"],
    ["memory", "a.yaml", "--recipe", "r.yaml", *DEVICE],
    ["train", "a.yaml", "--recipe", "r.yaml", "--dry-run", *DEVICE],
)
SWEEP_COMMANDS = (["sweep", "s.yaml", "--dry-run"], ["sweep", "s.yaml", "--dry-run", "--json"])
READING = (
    ["evaluate", "run", *DEVICE],
    ["generate", "run", "--max-new-tokens", "3", *DEVICE],
    ["generate", "run/checkpoints/step-00000004", "--max-new-tokens", "2", *DEVICE],
    ["compare", "run"],
    ["show", "run"],
    ["params", "run"],
    ["export", "run", "exported"],
)
DRAWING = ["analyze", "run", "--windows", "2", "--out", "analysis", *DEVICE]
"""Drawing takes seconds, and so this is rare."""
TRAINING = (
    ["train", "run", "recipe.steps=5", *DEVICE],
    ["train", "--resume", "run", *DEVICE],
    ["train", "a.yaml", "--recipe", "r.yaml", "--out", "run", *DEVICE],
    ["train", "--resume", "run/checkpoints/step-00000002", "--out", "other", *DEVICE],
)


@dataclass(frozen=True)
class Case:
    words: list[str]
    note: str
    folder: Path
    saved: dict[str, str]
    """Checksums of everything saved that was whole, before the command."""


class Fuzzer:
    """Originals to mutate, and the process that runs commands on copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.original = folder / "original"
        self.original.mkdir(parents=True)
        (self.original / "text.txt").write_text(drawn_text(300))
        data = {
            "kind": "text",
            "files": [str(self.original / "text.txt")],
            "document": "line",
            "validation_fraction": 0.05,
        }
        (self.original / "r.yaml").write_text(json.dumps(RECIPE | {"data": data}))
        (self.original / "s.yaml").write_text(json.dumps(SWEEP))
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "MOEUT_COMPOSE_CACHE": str(folder / "cache"),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fuzz_worker.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        (self.original / "a.yaml").write_text(json.dumps({"extends": "moeut_tiny", "name": "small"} | SMALL))
        for words in (TRAINING[2], *SPEC_COMMANDS, *SWEEP_COMMANDS, *READING):
            assert self.run(self.original, words, seconds=0) == 0, words
        shutil.rmtree(self.original / "exported")
        shutil.copy(self.original / "run" / "architecture.yaml", self.original / "a.yaml")

    def run(self, folder: Path, words: list[str], seconds: int = SECONDS) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"words": words, "folder": str(folder), "seconds": seconds}) + "\n"
        )
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def said(self, folder: Path) -> str:
        return (folder / "said.txt").read_text(errors="replace")

    def close(self) -> None:
        self._process.communicate()

    def case(self, seed: int) -> Case:
        """What a seed stands for, made ready in a folder of its own."""
        dice = random.Random(seed)
        folder = self.folder / f"case-{seed}"
        which = dice.choice(("spec", "recipe", "sweep", "run", "run", "run", "run"))
        if which == "run":
            shutil.copytree(self.original, folder, symlinks=True)
            note = mutate_run(dice, folder / "run")
            words = DRAWING if dice.random() < 0.005 else dice.choice((*READING, *TRAINING, *TRAINING))
            return Case(words, note, folder, whole_files(folder / "run"))
        folder.mkdir()
        for name in ("a.yaml", "r.yaml", "s.yaml", "text.txt"):
            shutil.copy(self.original / name, folder)
        file, commands = {
            "spec": ("a.yaml", SPEC_COMMANDS),
            "recipe": ("r.yaml", RECIPE_COMMANDS),
            "sweep": ("s.yaml", SWEEP_COMMANDS),
        }[which]
        return Case(dice.choice(commands), f"{file}: {mutate_yaml(dice, folder / file)}", folder, {})

    def faults(self, seed: int) -> list[str]:
        """What is wrong with how a command bears a case."""
        case = self.case(seed)
        status = self.run(case.folder, case.words)
        said = self.said(case.folder)
        found = []
        if status not in (0, 1, 2):
            found.append(f"exit status {status}")
        if "Traceback" in said:
            found.append("a traceback")
        if status in (1, 2) and not re.search(r"^error: |^[^\n]+: \S", said, re.MULTILINE):
            found.append("no message")
        found += [f"a line of {len(line)} letters" for line in said.splitlines() if len(line) > LONGEST_LINE]
        after = {digest for path, digest in checksums(case.folder)} if case.saved else set()
        found += [f"{name} is lost" for name, digest in case.saved.items() if digest not in after]
        if found:
            return [f"seed {seed}, {' '.join(case.words)}, {case.note}: {', '.join(found)}\n{said[-3000:]}"]
        shutil.rmtree(case.folder)
        return []


def checksums(folder: Path) -> Iterator[tuple[Path, str]]:
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            if path.is_file() and path.stat().st_size < 2**24 and path.stat().st_blocks:
                yield path, hashlib.sha256(path.read_bytes()).hexdigest()


def whole_files(run: Path) -> dict[str, str]:
    """Checksums of the files of checkpoints, whatever they are worth: a command may rename them, never change them."""
    return {str(path): digest for path, digest in checksums(run / "checkpoints") if path.name != "latest"}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"))
    yield fuzzer
    fuzzer.close()


def test_some_damage_ends_in_clean_errors(fuzzer: Fuzzer) -> None:
    assert not "\n".join(fault for seed in range(40) for fault in fuzzer.faults(seed))


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(100, 1100, 100))
def test_damage_ends_in_clean_errors(fuzzer: Fuzzer, begin: int) -> None:
    assert not "\n".join(fault for seed in range(begin, begin + 100) for fault in fuzzer.faults(seed))
