"""`sweep` on the command line, on the built-in corpus, and `compare` of its folder."""

import json
from pathlib import Path

import pytest

from .conftest import RECIPE

SWEEP = """\
name: rates
architectures: [moeut_tiny]
recipes: [short.yaml]
changes: {d_model: 32, vocab_size: 600, context_length: 64, stages.0.layers.0.feedforward.n_experts: 8}
grid:
  recipe.optimizer.lr: [1e-3, 3e-3]
"""


@pytest.fixture
def sweep(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path_factory.getbasetemp() / "sweep-cache"))
    Path("short.yaml").write_text(RECIPE)
    Path("rates.yaml").write_text(SWEEP)
    return Path("rates.yaml")


def test_a_dry_run_lists_the_runs(sweep: Path, cli, cli_json) -> None:
    listed = cli_json("sweep", str(sweep), "--dry-run")
    assert [run["run"] for run in listed["runs"]] == ["moeut_tiny-lr_0.001", "moeut_tiny-lr_0.003"]
    assert [(run["params"], run["steps"], run["tokens"]) for run in listed["runs"]] == [(156568, 2, 128)] * 2
    assert "2 runs, 256 tokens" in cli("sweep", str(sweep), "--dry-run").stdout
    assert (
        cli("sweep", str(sweep), "--dry-run", "--markdown")
        .stdout.splitlines()[2]
        .startswith("| moeut_tiny-lr_0.001 |")
    )
    assert (
        cli("sweep", str(sweep), "--dry-run", "--csv").stdout.splitlines()[0].startswith("run,architecture,")
    )
    assert not Path("runs").exists()


def test_a_sweep_and_its_comparison(sweep: Path, cli, cli_json) -> None:
    result = cli("sweep", str(sweep), "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["run", "status", "recipe.optimizer.lr"]
    assert lines[1].split()[:3] == ["moeut_tiny-lr_0.001", "done", "0.001"]
    assert lines[-1] == "sweep folder  runs/rates"
    assert {path.name for path in Path("runs/rates").glob("results.*")} == {
        "results.json",
        "results.csv",
        "results.md",
    }
    again = cli_json("sweep", str(sweep), "--device", "cpu")
    assert [run["status"] for run in again["runs"]] == ["done", "done"]
    assert again["runs"] == json.loads(Path("runs/rates/results.json").read_text())
    rows = cli_json("compare", "runs/rates", "dense_tiny")
    assert [row["name"] for row in rows] == ["moeut_tiny-lr_0.001", "moeut_tiny-lr_0.003", "dense_tiny"]
    assert [row["perplexity"] for row in rows[:2]] == [run["perplexity"] for run in again["runs"]]


def test_a_failed_run_is_told_and_exits_with_1(sweep: Path, cli) -> None:
    sweep.write_text(SWEEP + "  recipe.data.max_tokens: [4000, 10]\n")
    result = cli("sweep", str(sweep), "--device", "cpu", "--out", "here")
    assert result.exit_code == 1
    assert [line.split()[1] for line in result.stdout.splitlines()[1:5]] == ["done", "failed"] * 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(":")[1] for error in errors] == [
        f" moeut_tiny-lr_{lr}-max_tokens_10" for lr in (0.001, 0.003)
    ]
    assert "Traceback" not in result.stderr


def test_mistakes_and_wrong_usage(sweep: Path, cli) -> None:
    sweep.write_text(SWEEP.replace("optimizer", "optimiser"))
    wrong = cli("sweep", str(sweep), "--dry-run")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr == "rates.yaml:6:3: optimiser: unknown key; did you mean optimizer?\n"
    assert cli("sweep", "nowhere.yaml").exit_code == 2
    assert cli("sweep", str(sweep), "--json", "--csv").exit_code == 2
    Path("empty").mkdir()
    Path("empty/sweep.yaml").write_text(SWEEP)
    Path("empty/results.json").write_text("[]")
    assert "has metrics yet" in cli("compare", "empty").stderr
