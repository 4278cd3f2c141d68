"""A run that takes a second: a small MoEUT on a small text."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeut_compose.progress import SilentReporter
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import (
    AdamWSpec,
    BatchSpec,
    CheckpointSpec,
    CosineSchedule,
    EvaluationSpec,
    LoggingSpec,
    RecipeSpec,
    TextData,
)
from moeut_compose.train import plan
from moeut_compose.train.memory import Activations

OVERRIDES = [
    "vocab_size=120",
    "context_length=16",
    "d_model=32",
    "stages.0.repeats=2",
    "stages.0.layers.0.mixer.n_heads=2",
    "stages.0.layers.0.mixer.d_head=8",
    "stages.0.layers.0.feedforward.n_experts=8",
    "stages.0.layers.0.feedforward.d_expert=8",
    "stages.0.layers.0.feedforward.top_k=2",
]


@pytest.fixture(autouse=True)
def folders(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path_factory.getbasetemp() / "moeut-compose-cache"
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(shared))
    monkeypatch.setenv("MOEUT_COMPOSE_RUNS", str(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads on such small tensors mostly wait for each other, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing memory and timing the CPU take longer than these runs; `test_plan.py` tests them."""
    monkeypatch.setattr(plan, "measure_cpu_flops", lambda: 1e11)
    monkeypatch.setattr(plan, "trace_activations", lambda *_, **__: Activations(fixed=0, per_sequence=2**20))


@pytest.fixture
def spec() -> ModelSpec:
    return load_spec("moeut_tiny", OVERRIDES)


def drawn_text(n_lines: int) -> str:
    """Lines of twelve words each, the same every time."""
    dice = random.Random(2)
    words = [
        "whale",
        "sea",
        "ship",
        "harpoon",
        "captain",
        "storm",
        "island",
        "the",
        "a",
        "of",
        "saw",
        "feared",
    ]
    return "\n".join(" ".join(dice.choices(words, k=12)) + "." for _ in range(n_lines))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(drawn_text(600))
    return path


@pytest.fixture
def recipe(text_file: Path) -> RecipeSpec:
    return RecipeSpec(
        name="test",
        data=TextData(files=[str(text_file)], document="line", validation_fraction=0.05),
        order="shuffled",
        batch=BatchSpec(size=6, micro=4),
        steps=8,
        optimizer=AdamWSpec(lr=3e-3),
        schedule=CosineSchedule(warmup_steps=2),
        evaluation=EvaluationSpec(interval=3, windows=5, sample_tokens=5),
        checkpoint=CheckpointSpec(interval=4),
        logging=LoggingSpec(interval=3),
        seed=3,
    )


class StopAt(SilentReporter):
    """Calls `action` when the work called `title` has come to `amount` units."""

    def __init__(self, title: str, amount: float, action) -> None:
        self._title = title
        self._amount = amount
        self._action = action
        self.messages: list[str] = []

    def note(self, text: str) -> None:
        self.messages.append(text)

    warn = note

    @contextmanager
    def task(self, title: str, *, total: float | None, done: float = 0) -> Iterator["_Watched"]:
        yield _Watched(done, self._amount if title == self._title else float("inf"), self._action)


class _Watched:
    def __init__(self, done: float, amount: float, action) -> None:
        self._done = done
        self._amount = amount
        self._action = action

    def advance(self, n: float = 1, *, detail: str = "") -> None:
        self._done += n
        if self._done >= self._amount:
            self._amount = float("inf")
            self._action()


@pytest.fixture
def stop_at() -> type[StopAt]:
    return StopAt
