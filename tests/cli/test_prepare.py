"""Preparing text by itself is what training would have done."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from typer.testing import Result

from moeut_compose.data.tokenizer import Tokenizer

SMALL = ("vocab_size=60", "context_length=16", "recipe.data={kind: text, files: [words.txt], document: line}")


@pytest.fixture
def ends(cli: Callable[..., Result]) -> Callable[..., Result]:
    """Run a command that must end with `code`."""

    def run(*words: str, code: int = 0) -> Result:
        result = cli(*words)
        assert result.exit_code == code, result.stderr
        return result

    return run


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = ["whale", "sea", "ship", "storm", "island"]
    lines = [" ".join([*(words[i * k % 5] for k in range(1, 9)), str(i)]) for i in range(600)]
    (tmp_path / "words.txt").write_text("\n".join(lines))
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_prepare_fills_the_cache_that_training_reads(ends, cli_json) -> None:
    found = cli_json("data", "prepare", "moeut_tiny", *SMALL)
    assert (found["vocab_size"], found["context"]) == (60, 16)
    assert found["train_windows"] == (found["train_tokens"] - 1) // 16
    again = ends("data", "prepare", "moeut_tiny", *SMALL)
    assert "tokenising" not in again.stderr, "it is there"
    assert f"{found['train_tokens']:,} tokens" in again.stdout


def test_data_prepare_tells_what_is_wrong(ends) -> None:
    missing = ends("data", "prepare", "moeut_tiny", "recipe.data={kind: text, files: [no.txt]}", code=1)
    assert "no file matches 'no.txt'" in missing.stderr
    ends("data", "prepare", "moeut_tini", code=2)


def test_a_damaged_record_is_named_also_while_a_tokenizer_is_trained(ends, place: Path) -> None:
    (place / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    data = "recipe.data={kind: jsonl, files: [bad.jsonl]}"
    ended = ends("data", "prepare", "moeut_tiny", "vocab_size=100", data, code=1)
    assert ended.stderr.splitlines()[-1].endswith("bad.jsonl:2: no key 'text' (found: txt); set data.field")


def test_tokenizer_train_writes_a_sentencepiece_model(ends, place: Path) -> None:
    ends("tokenizer", "train", "--vocab-size", "50", "-o", "mine.model", SMALL[2])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(place / "mine.model"))
    assert processor.vocab_size() == 50
    assert Tokenizer.load(place / "mine.model").encode("whale sea") == processor.encode("whale sea")
    kept = ends("tokenizer", "train", "--vocab-size", "40", "-o", "mine.model", SMALL[2], code=2)
    assert "mine.model exists; --force replaces it" in kept.stderr
    ends("tokenizer", "train", "--vocab-size", "40", "-o", "mine.model", "--force", SMALL[2])
    assert Tokenizer.load(place / "mine.model").vocab_size == 40


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["d_model=4"], 2, "a tokenizer knows no architecture"),
        (["recipe.tokenizer={kind: sentencepiece, file: x.model}"], 1, "names a trained model, x.model"),
        (["--recipe", "synthetic_function_chain"], 1, "an alphabet of their own"),
        ([SMALL[2], "-o", "no/such/folder.model", "--vocab-size", "50"], 1, "no such file or directory"),
    ],
)
def test_tokenizer_train_refuses(ends, words: list[str], code: int, says: str) -> None:
    assert says in ends("tokenizer", "train", *words, code=code).stderr
