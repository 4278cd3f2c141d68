"""Children's Book Test: the missing word of a sentence after twenty others (Hill et al., arXiv:1511.02301)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks.files import BenchmarkFile, read_file
from moeut_compose.evaluate.tasks.items import Choice

if TYPE_CHECKING:
    from pathlib import Path

TYPES = ("CN", "NE", "P", "V")
"""Common nouns, named entities, prepositions, verbs."""
FOLDERS = ("CBTest.tgz/CBTest/data", "CBTest/data", "cbt", ".")
N_OPTIONS = 10
"""Questions with more or fewer are left out."""
BLANK = "XXXXX"
_REPLACEMENTS = (
    (" '", "'"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" n't", "n't"),
    ("`` ", '"'),
    ("''", '"'),
    *((f" {mark}", mark) for mark in ":;!?,."),
)


def read(folder: Path) -> list[Choice]:
    """The questions with ten options of all four types. Raises `DataError`."""
    return [
        choice
        for kind in TYPES
        for choice in _read_type(
            read_file(folder, [f"{path}/cbtest_{kind}_test_2500ex.txt" for path in FOLDERS]), kind
        )
    ]


def detokenize(text: str) -> str:
    """Undo the spaces and quotes of the tokenised files, by replacements in the published order."""
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


def _read_type(file: BenchmarkFile, kind: str) -> list[Choice]:
    """Blocks of numbered lines; the last of a block is the question, and an empty line may follow."""
    choices: list[Choice] = []
    context: list[str] = []
    for number, line in enumerate(file.text.split("\n"), 1):
        text = line.strip().partition(" ")[2]
        if "\t" not in text:
            if text:
                context.append(text)
            continue
        choice = _choice(context, text, kind, f"{file.path}, line {number}")
        if len(choice.options) == N_OPTIONS:
            choices.append(choice)
        context = []
    return choices


def _choice(context: list[str], question: str, kind: str, where: str) -> Choice:
    """One question, written `cloze <tab> answer <tab> <tab> option|option|…`."""
    fields = question.split("\t")
    cloze, answer, options = fields[0], fields[1].strip(), fields[-1].split("|")
    if BLANK not in cloze or answer not in options:
        raise DataError(f"{where}: expected a sentence with {BLANK}, its answer, and options with the answer")
    before, _, after = detokenize(cloze).partition(BLANK)
    return Choice(
        context=" ".join([*map(detokenize, context), before]),
        options=tuple(option + after for option in options),
        answer=options.index(answer),
        group=kind,
    )
