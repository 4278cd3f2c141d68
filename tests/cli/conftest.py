"""The command line in this process, in a working directory of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from moeut_compose.cli import app

RECIPE = """\
name: short
steps: 2
batch: {size: 2, micro: 1}
context: 32
data: {kind: builtin, max_tokens: 4000}
tokenizer: {kind: train_sentencepiece, max_documents: 40}
schedule: {kind: cosine, warmup_steps: 1}
evaluation: {windows: 2, sample_tokens: 4}
"""
SMALL = ["d_model=32", "vocab_size=600", "context_length=64", "stages.0.layers.0.feedforward.n_experts=8"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no settings from the environment."""
    monkeypatch.chdir(tmp_path)
    for variable in ("MOEUT_COMPOSE_PATH", "MOEUT_COMPOSE_RUNS", "MOEUT_COMPOSE_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run a command; an unexpected exception fails the test."""

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return run


@pytest.fixture
def cli_json(cli: Callable[..., Result]) -> Callable[..., Any]:
    """Run a command that must succeed, and read its one JSON document."""

    def run(*arguments: str) -> Any:
        result = cli(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run
