"""`evaluate --tasks` through the command line, on a run of two steps and benchmarks of a few items."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from moeut_compose.evaluate.protocols import rules
from moeut_compose.evaluate.tasks.items import Choice, LastWord
from moeut_compose.train.run import load_run
from tests.conftest import Command
from tests.evaluate.conftest import call

PAIRS = [{"sentence_good": "The cats are here.", "sentence_bad": "The cats is here."}] * 3
GOAL = {"goal": "boil water", "sol1": "use a kettle", "sol2": "use a sieve"}
KEYS = [
    "task", "protocol", "step", "limit", "items", "tokenizer",
    "accuracy", "confidence_interval", "n", "groups", "others", "seconds",
]  # fmt: skip


@pytest.fixture
def benchmarks(files: Path) -> Path:
    (files / "blimp").mkdir()
    (files / "blimp" / "agreement.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    (files / "piqa").mkdir()
    (files / "piqa" / "valid.jsonl").write_text(json.dumps(GOAL))
    (files / "piqa" / "valid-labels.lst").write_text("0")
    return files


@pytest.fixture
def evaluate(trained: Path, benchmarks: Path) -> Callable[..., Result]:
    return lambda *options: call("evaluate", str(trained), "--task-data", str(benchmarks), *options)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_one_json_document(evaluate, trained: Path) -> None:
    result = document(evaluate("--tasks", "piqa,blimp", "--json"))
    assert list(result) == ["name", "run", "step", "protocol", "tasks", "average"]
    assert (result["name"], result["run"], result["step"]) == ("moeut_tiny", str(trained), 2)
    assert (result["protocol"], result["average"]) == ("published", None)
    assert list(result["tasks"]) == ["piqa", "blimp"]
    for task in result["tasks"].values():
        assert list(task) == KEYS
        low, high = task["confidence_interval"]
        assert 0 <= low <= task["accuracy"] <= high <= 1
    assert result["tasks"]["blimp"]["n"] == 3
    kept = json.loads((trained / "evaluation" / "piqa.json").read_text())
    assert kept == result["tasks"]["piqa"]


def test_kept_results_are_said_to_be_kept(evaluate) -> None:
    options = ["--tasks", "piqa", "--json"]
    first, again, anew = evaluate(*options, "--anew"), evaluate(*options), evaluate(*options, "--anew")
    assert document(first) == document(again)
    assert "PIQA: taken from" in again.stderr
    assert "taken from" not in first.stderr + anew.stderr
    assert "PIQA: 1/1" in anew.stderr


def test_the_harness_protocol_and_a_limit(evaluate) -> None:
    result = document(evaluate("--tasks", "blimp", "--protocol", "harness", "--limit", "2", "--json"))
    task = result["tasks"]["blimp"]
    assert (result["protocol"], task["protocol"], task["limit"], task["n"]) == ("harness", "harness", 2, 2)


def test_a_table_for_people(evaluate) -> None:
    result = evaluate("--tasks", "piqa,blimp")
    assert result.exit_code == 0, result.stderr
    title, header, *rows = result.stdout.splitlines()
    assert title == "moeut_tiny at step 2, published protocol"
    assert header.split("  ")[0] == "task"
    assert [row.split()[0] for row in rows] == ["PIQA", "BLiMP"]


def test_perplexity_beside_benchmarks(evaluate) -> None:
    result = document(evaluate("--tasks", "perplexity,piqa", "--json"))
    assert result["windows"] == 2
    assert list(result["tasks"]) == ["piqa"]
    assert result["perplexity"] == document(evaluate("--json"))["perplexity"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tasks", "chess"], 2, "'chess' is not one of perplexity, lambada, blimp, cbt"),
        (["--tasks", "piqa,"], 2, "'' is not one of"),
        (["--tasks", "piqa", "--protocol", "guess"], 2, "'guess' is not one of published, harness"),
        (["--tasks", "piqa", "--limit", "0"], 2, "--limit"),
        (["--tasks", "lambada"], 1, "one of lambada_test.jsonl, lambada/lambada_test.jsonl"),
        (["--tasks", "cbt", "--protocol", "harness"], 1, "cbt has no rules in the harness protocol"),
    ],
)
def test_what_is_refused(evaluate, options: list[str], code: int, message: str) -> None:
    result = evaluate(*options, "--json")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr.replace("\n", " ")


def test_a_folder_has_to_be_named(trained: Path) -> None:
    result = call("evaluate", str(trained), "--tasks", "piqa")
    assert result.exit_code == 2
    assert "--task-data DIR" in result.stderr


def test_tasks_are_known_without_torch(command: Command, tmp_path: Path) -> None:
    """A wrong name is refused before torch, which the process could not import, is wanted."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = command("evaluate", "nowhere", "--tasks", "chess", cwd=tmp_path)
    assert result.returncode == 2
    assert "not one of perplexity" in result.stderr


def test_passages_of_a_real_tokenizer(trained: Path) -> None:
    """SentencePiece: a text begins a word by itself, so both protocols score the same tokens of an option."""
    run = load_run(trained)
    tokenizer = run.tokenizer
    item = Choice("Question: boil water\nAnswer:", ("use a kettle", "use  it "), 0)
    apart, joined = (
        rules(name, tokenizer, context_length=64).passages(item) for name in ("published", "harness")
    )
    assert apart == joined
    for option, passage in zip(item.options, apart, strict=True):
        assert tokenizer.decode(passage.targets) == " ".join(option.split())
        assert tokenizer.decode(passage.ids[: -passage.n_scored]) == "Question: boil water Answer:"
    word = LastWord('He said: "No, Shane!"')
    (passage,) = rules("published", tokenizer, context_length=64).passages(word)
    assert passage.n_scored == len('Shane!"')
    (passage,) = rules("harness", tokenizer, context_length=64).passages(word)
    assert tokenizer.decode(passage.targets) == 'Shane!"'
    (passage,) = rules("harness", tokenizer, context_length=64).passages(Choice("", ("The sea.",), 0))
    assert (passage.ids[0], passage.n_scored) == (tokenizer.start_id, len(passage.ids) - 1)
    assert tokenizer.start_id == 1
