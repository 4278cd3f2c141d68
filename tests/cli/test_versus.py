"""`match` and `compare` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Cli = Callable[..., Result]
EXPERTS = "stages.0.layers.0.feedforward.n_experts"


def test_match_writes_a_spec_that_extends_the_original(cli: Cli, tmp_path: Path) -> None:
    result = cli("match", "moeut_44m", "--to", "dense_44m", "--by", "params", "-o", "mine.yaml", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["values"] == {EXPERTS: 156}
    assert found["achieved"] - found["target"] == found["difference"] == 13296
    params = json.loads(cli("params", "mine.yaml", "--json").stdout)
    assert [(row["name"], row["total"]) for row in params] == [("mine", found["achieved"])]
    assert (tmp_path / "mine.yaml").read_text().startswith("extends: moeut_44m\n")


@pytest.mark.parametrize("name", ["moeut_tiny.yaml", "there.yaml"])
def test_match_neither_replaces_a_file_nor_extends_itself(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "there.yaml").write_text("mine\n")
    result = cli("match", "moeut_tiny", "--to", "dense_tiny", "--by", "params", "-o", name)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine\n"


def test_match_writes_names_that_yaml_would_read_as_numbers(cli: Cli) -> None:
    assert cli("match", "moeut_tiny", "--to", "dense_tiny", "--by", "params", "-o", "123.yaml").exit_code == 0
    assert json.loads(cli("params", "123.yaml", "--json").stdout)[0]["name"] == "123"


def test_match_says_that_a_field_changes_nothing(cli: Cli) -> None:
    result = cli("match", "moeut_tiny", "--to", "dense_tiny", "--by", "params", "--vary", "context_length")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "context_length does not change the count" in result.stderr


@pytest.mark.parametrize("name", [".", "/", ""])
def test_names_that_are_no_file(cli: Cli, name: str) -> None:
    result = cli("params", name)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)


def test_match_says_why_nothing_fits(cli: Cli) -> None:
    result = cli("match", "moeut_44m", "--to", "dense_tiny", "--by", "params")
    assert result.exit_code == 1
    assert "top_k=12 exceeds n_experts=11" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("name", "not an integer"),
        ("stages.9.repeats", "is not a field"),
        (f"{EXPERTS}:x", "not a positive integer"),
    ],
)
def test_match_refuses_fields_that_are_no_integers(cli: Cli, vary: str, message: str) -> None:
    result = cli("match", "moeut_tiny", "--to", "dense_tiny", "--by", "params", "--vary", vary)
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_prints_tables_and_documents(cli: Cli) -> None:
    rows = json.loads(cli("compare", "dense_tiny", "moeut_tiny", "--json").stdout)
    assert [row["name"] for row in rows] == ["dense_tiny", "moeut_tiny"]
    assert rows[1]["params"] == 2460928
    assert rows[1]["perplexity"] is None
    csv = cli("compare", "dense_tiny", "--csv").stdout.splitlines()
    assert csv[0].startswith("name,params,")
    assert csv[1].startswith("dense_tiny,2461022,")
    assert cli("compare", "dense_tiny", "--markdown").stdout.splitlines()[1].startswith("| --- | ---: |")


def test_compare_draws(cli: Cli, tmp_path: Path) -> None:
    result = cli("compare", "dense_tiny", "moeut_tiny", "--plot", "sizes.svg")
    assert result.exit_code == 0
    assert (tmp_path / "sizes.svg").stat().st_size > 1000
    assert cli("compare", "dense_tiny", "--plot", "sizes.doc").exit_code == 2


def test_compare_with_an_unknown_model(cli: Cli) -> None:
    result = cli("compare", "dense_tiny", "moeut_tinny")
    assert result.exit_code == 2
    assert "moeut_tiny" in result.stderr
