"""Results of benchmarks: kept and used again only where nothing changed, with intervals and averages."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.protocols import Verdict, is_first_best, is_strictly_best
from moeut_compose.evaluate.task_result import average, summarize, wilson_interval
from moeut_compose.evaluate.tasks import TASKS
from moeut_compose.evaluate.tasks.items import LastWord
from moeut_compose.evaluate.zero_shot import evaluate_tasks

NOT_A_NUMBER = float("nan")


@pytest.fixture
def lambada(files: Path) -> Path:
    texts = ["is it", "is up", "is to", "is it"]
    (files / "lambada_test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


@pytest.fixture
def run(make_run):
    return make_run({"▁is": {"▁it": 0.9}})


def test_a_finished_task_is_not_run_again(run, lambada: Path) -> None:
    first = evaluate_tasks(run, ["lambada"], lambada)
    n_passes = len(run.model.shapes)
    assert n_passes > 0
    assert evaluate_tasks(run, ["lambada"], lambada) == first
    assert len(run.model.shapes) == n_passes
    kept = json.loads((run.path / "evaluation" / "lambada.json").read_text())
    assert (kept["task"], kept["accuracy"], kept["n"], kept["step"]) == ("lambada", 0.5, 4, 7)
    evaluate_tasks(run, ["lambada"], lambada, anew=True)
    assert len(run.model.shapes) == 2 * n_passes


def test_a_result_is_for_one_step_tokenizer_and_set_of_items(run, lambada: Path) -> None:
    evaluate_tasks(run, ["lambada"], lambada)

    def is_run_again() -> bool:
        before = len(run.model.shapes)
        evaluate_tasks(run, ["lambada"], lambada)
        return len(run.model.shapes) > before

    assert not is_run_again()
    run.step += 1
    assert is_run_again()
    run.tokenizer.fingerprint = "another"
    assert is_run_again()
    (lambada / "lambada_test.jsonl").write_text('{"text": "is it"}\n')
    assert is_run_again()
    (run.path / "evaluation" / "lambada.json").write_text('{"task": "lam')
    assert is_run_again()
    assert not is_run_again()


def test_limits_and_protocols_are_kept_beside_the_whole(run, lambada: Path) -> None:
    evaluate_tasks(run, ["lambada"], lambada)
    (few,) = evaluate_tasks(run, ["lambada"], lambada, limit=1)
    (other,) = evaluate_tasks(run, ["lambada"], lambada, protocol="harness")
    assert (few.n, few.accuracy, other.n) == (1, 1.0, 4)
    assert sorted(path.name for path in (run.path / "evaluation").iterdir()) == [
        "lambada-harness.json",
        "lambada-limit-1.json",
        "lambada.json",
    ]


def test_finished_tasks_survive_a_later_failure(run, lambada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lambada / "arc_easy_test.jsonl").write_text(
        '{"question": {"stem": "", "choices": ['
        + ", ".join(f'{{"text": "{text}", "label": "{label}"}}' for text, label in ("a1", "b2", "c3", "d4"))
        + ']}, "answerKey": "1"}'
    )
    monkeypatch.setattr(run.tokenizer, "encode", _failing_on(run.tokenizer.encode, "Question"))
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(run, ["lambada", "arc_easy"], lambada)
    names = sorted(path.name for path in (run.path / "evaluation").iterdir())
    assert names == ["arc_easy.partial.jsonl", "lambada.json"]


def _failing_on(encode, start: str):
    def failing(text: str) -> list[int]:
        if text.startswith(start):
            raise KeyboardInterrupt
        return encode(text)

    return failing


def test_a_limit_is_for_each_group(run, files: Path) -> None:
    (files / "blimp").mkdir()
    for name, n in (("a", 3), ("b", 1)):
        (files / "blimp" / f"{name}.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n' * n)
    (result,) = evaluate_tasks(run, ["blimp"], files, limit=2)
    assert {name: group["n"] for name, group in result.groups.items()} == {"a": 2, "b": 1}


def test_missing_files_are_found_before_any_work(run, lambada: Path) -> None:
    with pytest.raises(DataError, match=r"piqa/valid\.jsonl"):
        evaluate_tasks(run, ["lambada", "piqa"], lambada)
    assert not run.model.shapes


def test_refusals(run, lambada: Path) -> None:
    with pytest.raises(ValueError, match="limit=0"):
        evaluate_tasks(run, ["lambada"], lambada, limit=0)
    with pytest.raises(ValueError, match="'chess' is not one of lambada, blimp"):
        evaluate_tasks(run, ["chess"], lambada)
    with pytest.raises(DataError, match="cbt has no rules in the harness protocol"):
        evaluate_tasks(run, ["cbt"], lambada, protocol="harness")
    (lambada / "lambada_test.jsonl").write_text("\n")
    with pytest.raises(DataError, match="lambada hold no items"):
        evaluate_tasks(run, ["lambada"], lambada)


def test_the_harness_needs_a_start_token_and_cuts_on_the_left(run, files: Path) -> None:
    (files / "blimp").mkdir()
    (files / "blimp" / "a.jsonl").write_text('{"sentence_good": "is it", "sentence_bad": "is up it"}\n')
    run.context = 1
    evaluate_tasks(run, ["blimp"], files, protocol="harness")
    assert {length for _, length in run.model.shapes} == {1}, "a token, and one to predict"
    run.tokenizer.start_id = None
    with pytest.raises(DataError, match="neither <s> nor </s>"):
        evaluate_tasks(run, ["blimp"], files, protocol="harness", anew=True)


def test_average_wants_all_six(run, lambada: Path) -> None:
    (result,) = evaluate_tasks(run, ["lambada"], lambada)
    results = [
        replace(result, identity=replace(result.identity, task=task), accuracy=0.1 * place)
        for place, task in enumerate(TASKS)
    ]
    assert average(results) == pytest.approx(0.25)
    assert average(results[:-1]) is None


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(right / n, n) == pytest.approx((low, high), abs=5e-5)
    low, high = wilson_interval(1.0, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


@pytest.mark.parametrize(
    ("values", "strictly", "first"),
    [
        ([2.0, 1.0, 0.0], True, True),
        ([1.0, 1.0, 0.0], False, True),
        ([1.0, 0.0, 2.0], False, False),
        ([1.0, NOT_A_NUMBER, 0.0], False, True),
    ],
)
def test_ties(values: list[float], strictly: bool, first: bool) -> None:
    assert is_strictly_best(values, 0) is strictly
    assert is_first_best(values, 0) is first
    assert not is_first_best([1.0, 1.0], 1)


def test_an_endless_perplexity_stays_a_number(run, lambada: Path) -> None:
    (result,) = evaluate_tasks(run, ["lambada"], lambada)
    huge = summarize(result.identity, [LastWord("a b")], [Verdict(False, {"target_nats": 1e6})])
    assert 1e300 < huge.others["target_perplexity"] < math.inf
