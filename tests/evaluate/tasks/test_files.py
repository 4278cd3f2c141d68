"""Reading benchmark files: what comes out of each format, and what is said when a file is missing or damaged."""

import json
import zipfile
from pathlib import Path

import pytest

from moeut_compose.data.errors import DataError
from moeut_compose.evaluate.tasks import TASKS, arc_easy, blimp, cbt, hellaswag, lambada, piqa
from moeut_compose.evaluate.tasks.items import LastWord

ARC = {"question": {"stem": "Why?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}}


EXPECTED = {
    "lambada": "lambada_test.jsonl",
    "blimp": "blimp.zip/data/",
    "cbt": "cbtest_CN_test_2500ex.txt",
    "hellaswag": "hellaswag_val.jsonl",
    "piqa": "piqa/valid.jsonl",
    "arc_easy": "ARC-Easy-Test.jsonl",
}


@pytest.mark.parametrize("name", TASKS)
def test_missing_files_are_named(files: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"does not have the files expected: .*{EXPECTED[name]}"):
        TASKS[name].read_published(files)
    with pytest.raises(DataError, match="no such folder"):
        TASKS[name].read_published(files / "nowhere")


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (lambada.read, "lambada_test.jsonl", "\n{nonsense\n", "lambada_test.jsonl, line 2: not JSON"),
        (
            lambada.read,
            "lambada_test.jsonl",
            '{"txt": "a"}',
            "line 1: expected 'text' to be a str, found None",
        ),
        (lambada.read, "lambada_test.jsonl", '{"text": "a b "}', "line 1: the passage ends with a space"),
        (lambada.read, "lambada_test.jsonl", "[1]", r"line 1: expected an object, found \[1\]"),
        (lambada.read, "lambada_test.jsonl.xz", "not xz", "cannot read .*lambada_test.jsonl.xz"),
        (blimp.read, "blimp.zip", "not a zip", "cannot read .*blimp.zip"),
        (cbt.read, "CBTest.tgz", "not a tar", "cannot read .*CBTest.tgz"),
        (
            arc_easy.read,
            "arc_easy_test.jsonl",
            json.dumps({**ARC, "answerKey": "C"}),
            "'C' is not one of 1, 2",
        ),
        (
            hellaswag.read,
            "hellaswag_val.jsonl",
            '{"ctx_a": "", "ctx_b": "", "activity_label": "", "endings": ["a"], "label": 1}',
            "line 1: expected a label from 0 to 0, found 1",
        ),
        (
            hellaswag.read,
            "hellaswag_val.jsonl",
            '{"ctx_a": "", "ctx_b": "", "activity_label": "", "endings": ["a", null], "label": 0}',
            "line 1: expected endings that are texts",
        ),
        (
            arc_easy.read,
            "arc_easy_test.jsonl",
            json.dumps(
                {"question": {"stem": "q", "choices": [{"label": "A", "text": "x"}] * 2}, "answerKey": "A"}
            ),
            "line 1: a label occurs twice in A, A",
        ),
    ],
)
def test_damaged_files(files: Path, read, name: str, content: str, message: str) -> None:
    (files / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(files)


@pytest.mark.parametrize(
    ("labels", "message"), [("0\n1\n", "1 items, and .* 2 labels"), ("2\n", "found '2'")]
)
def test_labels_that_do_not_fit(files: Path, labels: str, message: str) -> None:
    with zipfile.ZipFile(files / "physicaliqa-train-dev.zip", "w") as archive:
        archive.writestr("physicaliqa-train-dev/dev.jsonl", '{"goal": "", "sol1": "", "sol2": ""}')
        archive.writestr("physicaliqa-train-dev/dev-labels.lst", labels)
    with pytest.raises(DataError, match=message):
        piqa.read(files)


def test_labels_of_arc_may_be_numbers(files: Path) -> None:
    (files / "arc_easy_test.jsonl").write_text(json.dumps({**ARC, "answerKey": "2"}))
    (choice,) = arc_easy.read(files)
    assert (choice.context, choice.options, choice.answer) == ("Question: Why?\nAnswer:", ("a", "b"), 1)


def test_last_word() -> None:
    item = LastWord("one  two, three")
    assert (item.context, item.word) == ("one  two,", "three")


def test_unpacked_blimp_is_read_in_the_order_of_names(files: Path) -> None:
    (files / "blimp").mkdir()
    for name in ("b", "a"):
        (files / "blimp" / f"{name}.jsonl").write_text('{"sentence_good": "x", "sentence_bad": "y"}\n')
    assert [choice.group for choice in blimp.read(files)] == ["a", "b"]


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        ("`` Do n't , '' said he : `` it 's so ! ''", '"Don\'t," said he: "it\'s so!"'),
        ("What ? No ; yes .", "What? No; yes."),
        ("one \n two", "one\ntwo"),
        ("( left alone ) -- here", "( left alone ) -- here"),
    ],
)
def test_cbt_detokenizing(tokenized: str, text: str) -> None:
    assert cbt.detokenize(tokenized) == text


def test_a_cbt_question(files: Path) -> None:
    """Line numbers go, context and cloze are detokenised, options are not."""
    context = [f"{number} line {number} , here ." for number in range(1, 21)]
    options = "ca n't|b|c|d|e|f|g|h|i|j"
    question = f"21 `` It XXXXX be , '' he said .\tca n't\t\t{options}"
    for kind in cbt.TYPES:
        (files / f"cbtest_{kind}_test_2500ex.txt").write_text("\n".join([*context, question, "", ""]))
    choice, *others = cbt.read(files)
    lines = " ".join(f"line {number}, here." for number in range(1, 21))
    assert choice.context == f'{lines} "It '
    assert choice.options[:2] == ("ca n't be,\" he said.", 'b be," he said.')
    assert (choice.answer, choice.group) == (0, "CN")
    assert [other.group for other in others] == ["NE", "P", "V"]


@pytest.mark.parametrize("question", ["no blank\tb\t\ta|b", "an XXXXX\tc\t\ta|b"])
def test_a_damaged_cbt_question(files: Path, question: str) -> None:
    (files / "cbtest_CN_test_2500ex.txt").write_text(f"1 line\n2 {question}\n")
    with pytest.raises(DataError, match="line 2: expected a sentence with XXXXX"):
        cbt.read(files)


def test_hellaswag_cleaning() -> None:
    raw = " [header] How to   cook [title] Wash. [step] Go "
    assert hellaswag.clean_published(raw) == "[header] How to  cook. Wash. [step] Go"
    assert hellaswag.clean(raw) == " How to  cook. Wash. Go"
