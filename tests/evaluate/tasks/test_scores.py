"""Every benchmark on hand-made files in its original format: the score is the one computed by hand."""

import gzip
import io
import json
import lzma
import math
import tarfile
import zipfile
from pathlib import Path

import pytest

from moeut_compose.evaluate.zero_shot import evaluate_tasks


def jsonl(*records: dict) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def score(run, task: str, files: Path, **options):
    (result,) = evaluate_tasks(run, [task], files, **options)
    return result


def blimp_zip(path: Path, **paradigms: list[tuple[str, str]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/data/._wh.jsonl", b"\x00\xff")
        archive.writestr("data/.DS_Store", b"\x00\xff")
        for name, pairs in paradigms.items():
            rows = [{"sentence_good": good, "sentence_bad": bad, "UID": name} for good, bad in pairs]
            archive.writestr(f"data/{name}.jsonl", jsonl(*rows))


def test_blimp(make_run, files: Path) -> None:
    """The first token is not scored: that `▁Go` is rarer than `▁It` does not count; sums are not normalised."""
    blimp_zip(
        files / "blimp.zip",
        agreement=[
            ("it is", "it be"),  # ln 0.5 > ln 0.2: right
            ("it be", "it is"),  # wrong
            ("go on up", "go up"),  # ln 0.5 + ln 0.5 = ln 0.25 < ln 0.3, though its mean is higher: wrong
            ("go on", "it is"),  # ln 0.5 = ln 0.5, a tie: wrong
        ],
        islands=[("go up", "it be")],  # ln 0.3 > ln 0.2: right
    )
    run = make_run(
        {"▁it": {"▁is": 0.5, "▁be": 0.2}, "▁go": {"▁on": 0.5, "▁up": 0.3}, "▁on": {"▁up": 0.5}},
    )
    result = score(run, "blimp", files)
    assert result.groups == {
        "agreement": {"accuracy": 1 / 4, "n": 4},
        "islands": {"accuracy": 1.0, "n": 1},
    }
    assert result.accuracy == (1 / 4 + 1) / 2, "mean over paradigms, not over pairs"
    assert result.n == 5


def test_blimp_in_the_harness_scores_the_first_token_and_gives_ties_to_the_first(make_run, files) -> None:
    blimp_zip(
        files / "blimp.zip",
        one=[
            ("it is", "go on"),  # 0.1 * 0.5 > 0.05 * 0.5: right, and published a tie
            ("go on", "it is"),  # wrong
            ("it is", "it is"),  # a tie goes to the first: right
        ],
    )
    run = make_run({"<s>": {"▁it": 0.1, "▁go": 0.05}, "▁it": {"▁is": 0.5}, "▁go": {"▁on": 0.5}})
    assert score(run, "blimp", files, protocol="harness").accuracy == 2 / 3
    assert score(run, "blimp", files, protocol="published").accuracy == 0


def piqa_files(folder: Path) -> None:
    items = [
        {"goal": "hi", "sol1": "up", "sol2": "up to it"},
        {"goal": "hi", "sol1": "to up", "sol2": "up"},
        {"goal": "hi", "sol1": "up", "sol2": "up"},
    ]
    (folder / "piqa").mkdir()
    (folder / "piqa" / "valid.jsonl").write_text(jsonl(*items))
    (folder / "piqa" / "valid-labels.lst").write_text("1\n1\n0\n")


PIQA = {":": {"▁up": 0.3, "▁to": 0.1}, "▁up": {"▁to": 0.5}, "▁to": {"▁it": 0.8, "▁up": 0.9 - 0.8}}


def test_piqa(make_run, files: Path) -> None:
    """`Question: hi⏎Answer:` ends with the piece `:`; scores are means over the tokens of the solution."""
    piqa_files(files)
    up, up_to_it = math.log(0.3), (math.log(0.3) + math.log(0.5) + math.log(0.8)) / 3
    to_up = (math.log(0.1) + math.log(0.1)) / 2
    assert up_to_it > up  # first item: the second solution, right
    assert up > to_up  # second item: right
    # third item: a tie, wrong
    assert score(make_run(PIQA), "piqa", files).accuracy == 2 / 3


def test_piqa_in_the_harness(make_run, files: Path) -> None:
    piqa_files(files)
    by_character = math.log(0.3) / 2, math.log(0.3 * 0.5 * 0.8) / len("up to it")
    assert by_character[1] > by_character[0]  # first item: right normalised, wrong by the plain sum
    result = score(make_run(PIQA), "piqa", files, protocol="harness")
    assert result.accuracy == 1, "the tie of the third goes to the first solution, which is right"
    assert result.others == {"unnormalized_accuracy": 2 / 3}


def test_piqa_normalises_by_tokens_where_the_harness_counts_characters(make_run, files: Path) -> None:
    """`upupup` is three tokens and six letters, `a` one token and one letter."""
    (files / "piqa").mkdir()
    (files / "piqa" / "valid.jsonl").write_text(jsonl({"goal": "hi", "sol1": "a", "sol2": "upupup"}))
    (files / "piqa" / "valid-labels.lst").write_text("0\n")
    run = make_run({":": {"▁a": 0.4, "▁up": 0.2}, "▁up": {"up": 0.3}, "up": {"up": 0.3}})
    tokens = math.log(0.4), math.log(0.2 * 0.3 * 0.3) / 3
    characters = math.log(0.4) / 1, math.log(0.2 * 0.3 * 0.3) / 6
    assert tokens[0] > tokens[1] and characters[0] < characters[1]
    assert score(run, "piqa", files).accuracy == 1
    assert score(run, "piqa", files, protocol="harness").accuracy == 0


def test_arc_easy(make_run, files: Path) -> None:
    def question(answer: str, *texts: str) -> dict:
        choices = [{"text": text, "label": "ABCDE"[i]} for i, text in enumerate(texts)]
        return {"id": "x", "question": {"stem": "hi", "choices": choices}, "answerKey": answer}

    records = [
        question("B", "up", "to", "it", "is"),  # 0.2 0.4 0.1 0.05: right
        question("A", "up", "to", "it", "is"),  # wrong
        question("A", "to", "up", "it"),  # three options: left out as published, right in the harness
    ]
    with lzma.open(files / "arc_easy_test.jsonl.xz", "wt") as file:
        file.write(jsonl(*records))
    run = make_run({":": {"▁up": 0.2, "▁to": 0.4, "▁it": 0.1, "▁is": 0.05}})
    published, harness = (score(run, "arc_easy", files, protocol=name) for name in ("published", "harness"))
    assert (published.accuracy, published.n) == (1 / 2, 2)
    assert (harness.accuracy, harness.n) == (2 / 3, 3)


def test_hellaswag(make_run, files: Path) -> None:
    """`Go up: It is. He` and an ending; tags stay as published, so `[step]` is scored there alone."""
    scene = {"activity_label": "Go up", "ctx_a": "It is.", "ctx_b": "he"}
    records = [
        {**scene, "endings": ["is", "be", "to", "on"], "label": 1},  # right
        {**scene, "endings": ["is", "be", "to", "on"], "label": 0},  # wrong
        {**scene, "endings": ["[a] be", "is", "to", "on"], "label": 0},
    ]
    with gzip.open(files / "hellaswag_val.jsonl.gz", "wt") as file:
        file.write(jsonl(*records))
    run = make_run({"▁He": {"▁is": 0.2, "▁be": 0.6, "▁to": 0.05, "▁on": 0.05}})
    # third item, published: `[a] be` is `▁[a ] ▁be`, whose first piece has less than a hundredth: wrong
    assert score(run, "hellaswag", files).accuracy == 1 / 3
    # harness: the option is `be` after a space, and the likeliest
    assert score(run, "hellaswag", files, protocol="harness").accuracy == 2 / 3


def test_lambada(make_run, files: Path) -> None:
    """Greedy predictions at as many places as the word has letters must end in the word, boundary included."""
    texts = ["oh Shane is Shane", "oh is Shame", "oh to it", "is Sheila", "oh up Shane"]
    (files / "lambada_test.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    run = make_run(
        {
            "▁oh": {"▁Sh": 0.6, "▁to": 0.1, "▁is": 0.2},
            "▁is": {"▁Sh": 0.7},
            "▁Sh": {"an": 0.6, "am": 0.3},
            "an": {"e": 0.9},
            "am": {"e": 0.9},
            "e": {"▁is": 0.9},
            "▁to": {"▁it": 0.5},
            "▁up": {"Sh": 0.8, "▁Sh": 0.1},
        }
    )
    result = score(run, "lambada", files)
    # 1 five letters, so the last five predictions: `e ▁is ▁Sh an e`, whose last word is Shane: right
    # 2 `▁oh ▁is ▁Sh am e`: predictions `▁Sh ▁Sh an e` end in Shane, not Shame: wrong
    # 3 two letters: predictions `▁Sh ▁it`: right
    # 4 `▁is ▁Sh ei la`: `▁Sh an` and whatever follows `ei`: wrong
    # 5 `▁oh ▁up ▁Sh an e`: predictions `▁Sh Sh an e`, without a border before Shane: wrong
    assert result.accuracy == 2 / 5
    assert result.others["last_token_accuracy"] == 4 / 5
    unknown = 0.1 / 94, 1 / 96  # `ei` after `▁Sh`, `la` after `ei`
    nats = [
        math.log(0.7 * 0.6 * 0.9) / 3,
        math.log(0.7 * 0.3 * 0.9) / 3,
        math.log(0.5),
        math.log(0.7 * unknown[0] * unknown[1]) / 3,
        math.log(0.1 * 0.6 * 0.9) / 3,
    ]
    assert result.others["target_perplexity"] == pytest.approx(math.exp(-sum(nats) / 5), rel=1e-5)


def test_lambada_in_the_harness(make_run, files: Path) -> None:
    """All tokens of the word must be the likeliest; perplexity is per word."""
    texts = ["oh is Shane", "oh is Shame", "oh to it"]
    (files / "lambada_test.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    run = make_run(
        {
            "▁is": {"▁Sh": 0.7},
            "▁Sh": {"an": 0.6, "am": 0.3},
            "an": {"e": 0.9},
            "am": {"e": 0.9},
            "▁to": {"▁it": 0.5},
        }
    )
    result = score(run, "lambada", files, protocol="harness")
    assert result.accuracy == 2 / 3
    nats = [math.log(0.7 * 0.6 * 0.9), math.log(0.7 * 0.3 * 0.9), math.log(0.5)]
    assert result.others == {"target_perplexity": pytest.approx(math.exp(-sum(nats) / 3), rel=1e-5)}


OPTIONS = "is|it|to|on|up|be|go|he|we|me"


def cbt_text(*questions: tuple[str, str, str]) -> str:
    blocks = []
    for cloze, answer, options in questions:
        lines = [f"{number} it is n't so ." for number in range(1, 21)]
        blocks.append("\n".join([*lines, f"21 {cloze}\t{answer}\t\t{options}"]))
    return "\n\n".join(blocks) + "\n"


def cbt_files(folder: Path, **types: str) -> None:
    filler = cbt_text(("go XXXXX !", "is", OPTIONS))
    with tarfile.open(folder / "CBTest.tgz", "w:gz") as archive:
        for kind in ("CN", "NE", "P", "V"):
            content = types.get(kind, filler).encode()
            member = tarfile.TarInfo(f"CBTest/data/cbtest_{kind}_test_2500ex.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cbt(make_run, files: Path) -> None:
    """An option and what follows the blank, `is!` for `go XXXXX !`, after the piece before the blank."""
    cbt_files(
        files,
        CN=cbt_text(
            ("go XXXXX !", "is", OPTIONS),  # `▁is !` 0.5 * 0.5, the best: right
            ("go XXXXX !", "it", OPTIONS),  # `▁it !` 0.2 * 0.5: wrong
            ("we XXXXX up", "to", OPTIONS),  # `▁to ▁up` 0.6 * 0.6: right
            ("go XXXXX !", "is", "is|it"),  # two options: left out
        ),
        V=cbt_text(("go XXXXX !", "me", OPTIONS)),  # wrong
    )
    run = make_run(
        {
            "▁go": {"▁is": 0.5, "▁it": 0.2},
            "▁is": {"!": 0.5},
            "▁it": {"!": 0.5},
            "▁we": {"▁to": 0.6},
            "▁to": {"▁up": 0.6},
        }
    )
    result = score(run, "cbt", files)
    assert result.groups["CN"] == {"accuracy": 2 / 3, "n": 3}
    assert result.groups["V"] == {"accuracy": 0, "n": 1}
    assert result.accuracy == pytest.approx((2 / 3 + 1 + 1 + 0) / 4), "mean over the four types"
