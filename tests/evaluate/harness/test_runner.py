"""The runner of lm-evaluation-harness on local tasks, through both command lines, without a network."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from moeut_compose.data.hub import import_datasets
from moeut_compose.evaluate.harness import HarnessModel
from tests.conftest import ROOT
from tests.evaluate.conftest import call

GOALS = [
    {"goal": f"{what} water", "sol1": f"{how} a kettle", "sol2": f"{how} a very big sieve, or a sock"}
    for what in ("boil", "heat", "pour", "cool")
    for how in ("use", "take", "find")
]
TASKS = {
    "local_piqa": """
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: 0
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{goal}} {{sol1}} {{sol2}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "Question: {{goal}} Answer:"
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture
def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(import_datasets().config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # no forks in a test process with threads
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(goal) + "\n" for goal in GOALS))
    for name, text in TASKS.items():
        files = json.dumps({"data_files": {"test": str(folder / "items.jsonl")}})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def metrics(task: dict[str, Any]) -> dict[str, float]:
    return {record["metric"]: record["value"] for record in task["metrics"]}


@pytest.mark.slow
def test_one_json_document_with_the_scores_of_our_own_protocol(
    trained: Path, local_tasks: Path, tmp_path: Path
) -> None:
    options = ["--harness", "local_*", "--harness-include", str(local_tasks), "--json"]
    result = call("evaluate", str(trained), *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document) == ["name", "run", "step", "harness"]
    assert document["step"] == 2
    tasks = document["harness"]["tasks"]
    assert sorted(tasks) == sorted(TASKS)
    assert {task["n"] for task in tasks.values()} == {len(GOALS)}
    assert metrics(tasks["local_text"])["bits_per_byte"] > 0
    assert 0 <= metrics(tasks["local_answer"])["exact_match"] <= 1

    files = tmp_path / "piqa"
    files.mkdir()
    (files / "valid.jsonl").write_text("".join(json.dumps(goal) + "\n" for goal in GOALS))
    (files / "valid-labels.lst").write_text("0\n" * len(GOALS))
    own = ["--tasks", "piqa", "--task-data", str(tmp_path), "--protocol", "harness", "--json"]
    ours = json.loads(call("evaluate", str(trained), *own).stdout)["tasks"]["piqa"]
    theirs = metrics(tasks["local_piqa"])
    assert theirs["acc"] == pytest.approx(ours["others"]["unnormalized_accuracy"])
    assert theirs["acc_norm"] == pytest.approx(ours["accuracy"])


@pytest.mark.slow
def test_a_table_and_a_limit(trained: Path, local_tasks: Path) -> None:
    options = ["--harness", "local_piqa", "--harness-include", str(local_tasks), "--limit", "3"]
    result = call("evaluate", str(trained), *options)
    assert result.exit_code == 0, result.stderr
    title, header, *rows = result.stdout.splitlines()
    assert title.startswith("moeut_tiny at step 2, lm-evaluation-harness 0.")
    assert header.split() == ["task", "metric", "value", "±", "stderr", "items"]
    assert [row.split()[:2] for row in rows] == [["local_piqa", "acc"], ["local_piqa", "acc_norm"]]
    assert all(row.endswith("  3") for row in rows)


@pytest.mark.slow
def test_the_command_of_the_harness(trained: Path, local_tasks: Path) -> None:
    """`lm_eval --model moeut_compose` with versions that read no entry points."""
    line = [sys.executable, "-m", "moeut_compose.evaluate.harness", "--model", "moeut_compose"]
    line += ["--model_args", f"run={trained}", "--tasks", "local_piqa", "--include_path", str(local_tasks)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*line, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=local_tasks,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|local_piqa|" in done.stdout
    assert "acc_norm" in done.stdout


def test_the_entry_point_names_the_registered_model() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lm_eval.models"]["moeut_compose"].split(":")
    assert getattr(import_module(module), name) is HarnessModel is get_model("moeut_compose")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        pytest.param(
            ["--harness", "lambada_opanai"],
            2,
            "has no task 'lambada_opanai'; did you mean lambada_openai",
            marks=pytest.mark.slow,
        ),
        (["--harness-include", "."], 2, "name the tasks in --harness"),
        (["--harness", "x", "--harness-include", "nowhere"], 2, "there is no folder nowhere"),
    ],
)
def test_refusals(trained: Path, options: list[str], code: int, message: str) -> None:
    result = call("evaluate", str(trained), *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


@pytest.mark.slow
def test_items_that_cannot_be_had(trained: Path, local_tasks: Path) -> None:
    (local_tasks / "items.jsonl").unlink()
    result = call(
        "evaluate", str(trained), "--harness", "local_text", "--harness-include", str(local_tasks), "--json"
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot read the items of local_text" in result.stderr
    assert "--task-data DIR" in result.stderr


def test_without_the_harness_the_extra_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = call("evaluate", str(trained), "--harness", "lambada_openai")
    assert result.exit_code == 1
    assert "pip install 'moeut-compose[eval]'" in result.stderr
