"""The benchmarks from the Hugging Face hub, written to the cache in their original formats.

Everything after this reads the same files, whether they were handed out or fetched, and a benchmark that was
fetched once needs no network any more.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import fsync_directory
from moeut_compose.data.hub import hub_failures, import_datasets
from moeut_compose.data.location import cache_folder
from moeut_compose.progress import SilentReporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from moeut_compose.progress import Reporter

Row = dict[str, Any]
WAYS_OUT = """ways out:
  - name a folder with the original files in --task-data DIR; docs/evaluation.md lists their names
  - fetch the benchmarks on a machine with a network, and copy them to {folder} here"""
BLIMP = """
    adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
    animate_subject_trans causative complex_NP_island coordinate_structure_constraint_complex_left_branch
    coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 determiner_noun_agreement_2
    determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2
    determiner_noun_agreement_with_adj_2 determiner_noun_agreement_with_adj_irregular_1
    determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
    distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1
    ellipsis_n_bar_2 existential_there_object_raising existential_there_quantifiers_1
    existential_there_quantifiers_2 existential_there_subject_raising expletive_it_object_raising inchoative
    intransitive irregular_past_participle_adjectives irregular_past_participle_verbs
    irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
    left_branch_island_echo_question left_branch_island_simple_question matrix_question_npi_licensor_present
    npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1 passive_2
    principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
    principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
    regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present
    sentential_negation_npi_scope sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2
    tough_vs_raising_1 tough_vs_raising_2 transitive wh_island wh_questions_object_gap wh_questions_subject_gap
    wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap
    wh_vs_that_with_gap_long_distance
"""
"""Its paradigms, each a configuration of the dataset."""


@dataclass(frozen=True)
class HubBenchmark:
    """Where a benchmark lies on the hub, and how its rows become lines of its original files."""

    dataset: str
    split: str
    lines: Callable[[Row], dict[str, Any]]
    """What a row adds to each file of the original form: an object for .jsonl, else a text."""
    configs: Sequence[str | None] = (None,)
    """Configurations; `{config}` in the name of a file stands for each."""


def _lambada(row: Row) -> dict[str, Any]:
    return {"lambada_test.jsonl": {"text": row["text"]}}


def _blimp(row: Row) -> dict[str, Any]:
    return {"blimp/{config}.jsonl": {key: row[key] for key in ("sentence_good", "sentence_bad")}}


def _hellaswag(row: Row) -> dict[str, Any]:
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    return {"hellaswag_val.jsonl": {key: row[key] for key in fields}}


def _piqa(row: Row) -> dict[str, Any]:
    record = {key: row[key] for key in ("goal", "sol1", "sol2")}
    return {"piqa/valid.jsonl": record, "piqa/valid-labels.lst": str(row["label"])}


def _arc_easy(row: Row) -> dict[str, Any]:
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    question = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in pairs]}
    return {"arc_easy_test.jsonl": {"question": question, "answerKey": row["answerKey"]}}


HUB_BENCHMARKS = {
    "lambada": HubBenchmark("EleutherAI/lambada_openai", "test", _lambada, ("default",)),
    "blimp": HubBenchmark("nyu-mll/blimp", "train", _blimp, BLIMP.split()),
    "hellaswag": HubBenchmark("Rowan/hellaswag", "validation", _hellaswag),
    "piqa": HubBenchmark("baber/piqa", "validation", _piqa),
    "arc_easy": HubBenchmark("allenai/ai2_arc", "test", _arc_easy, ("ARC-Easy",)),
}
"""The copies that lm-evaluation-harness reads. CBT is not among them and is read from its files alone."""


def fetch_benchmarks(tasks: Iterable[str], *, reporter: Reporter | None = None) -> dict[str, Path]:
    """A folder with the files of each task, from the cache or else from the hub. Raises `DataError`."""
    tasks = list(tasks)
    for task in tasks:
        if task not in HUB_BENCHMARKS:
            raise DataError(
                f"{task} is not read from the Hugging Face hub; name a folder with its files in --task-data DIR"
            )
    return {task: _fetch(task, reporter or SilentReporter()) for task in tasks}


def _fetch(task: str, reporter: Reporter) -> Path:
    folder = cache_folder("benchmarks") / task
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{task}.{os.getpid()}.tmp")
    try:
        _write(HUB_BENCHMARKS[task], temporary, task, reporter)
        fsync_directory(temporary)
        temporary.rename(folder)
    except hub_failures() as error:
        if folder.is_dir():  # another process was faster, with the same content
            return folder
        raise DataError(
            f"cannot read the dataset {HUB_BENCHMARKS[task].dataset} for {task}: {error}\n"
            f"{WAYS_OUT.format(folder=folder)}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(benchmark: HubBenchmark, folder: Path, task: str, reporter: Reporter) -> None:
    datasets = import_datasets()
    with reporter.task(f"fetching {task}", total=len(benchmark.configs)) as progress:
        for config in benchmark.configs:
            lines: dict[str, list[str]] = {}
            for row in datasets.load_dataset(benchmark.dataset, config, split=benchmark.split):
                for name, line in _lines_of(benchmark, row).items():
                    lines.setdefault(name, []).append(line if isinstance(line, str) else json.dumps(line))
            for name, of_file in lines.items():
                path = folder / name.format(config=config)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(f"{line}\n" for line in of_file), encoding="utf-8")
            progress.advance()


def _lines_of(benchmark: HubBenchmark, row: Row) -> dict[str, Any]:
    try:
        return benchmark.lines(row)
    except (KeyError, TypeError) as error:
        raise DataError(f"{benchmark.dataset} has other columns than expected: {', '.join(row)}") from error
