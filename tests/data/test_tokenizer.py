"""The tokenizer: published settings, no silent loss of text, trained once."""

from pathlib import Path

import pytest

from moeut_compose.data import tokenizer as module
from moeut_compose.data.errors import DataError
from moeut_compose.data.sources import open_source
from moeut_compose.data.tokenizer import (
    Tokenizer,
    prepare_tokenizer,
    split_text,
    train_tokenizer,
    with_separator,
)
from moeut_compose.progress import PlainReporter
from moeut_compose.spec.recipe import JsonlData, SentencePieceFile, TrainSentencePiece


def test_published_settings(documents: list[str]) -> None:
    tokenizer = train_tokenizer(
        TrainSentencePiece(), with_separator(documents, "<STORY_SEP>"), vocab_size=200
    )
    assert tokenizer.vocab_size == 200
    pieces = tokenizer._processor.encode("in 1789.", out_type=str)
    assert {"1", "7", "8", "9"} <= set(pieces), "split_digits cuts numbers into digits"
    assert tokenizer._processor.encode("whale", out_type=str)[0].startswith("▁"), "a document starts a word"
    assert tokenizer.decode(tokenizer.encode("Ahab  sees\n\tthe sea")) == "Ahab sees the sea", (
        "whitespace collapses"
    )
    assert (tokenizer._processor.unk_id(), tokenizer._processor.bos_id(), tokenizer._processor.pad_id()) == (
        0,
        1,
        -1,
    )
    separator = tokenizer._processor.encode("<STORY_SEP>", out_type=str)
    assert len(separator) > 1, "the separator is text, not a special token"


def test_long_documents_are_skipped_with_a_word_or_split(documents: list[str], capsys) -> None:
    import sys

    rare = "Zarathustra " * 500
    spec = TrainSentencePiece()
    skipped = train_tokenizer(spec, [*documents, rare], vocab_size=200, reporter=PlainReporter(sys.stderr))
    assert "ignored 1 of 101 documents" in capsys.readouterr().err
    split = train_tokenizer(
        spec.model_copy(update={"long_documents": "split"}), [*documents, rare], vocab_size=200
    )
    assert len(split.encode("Zarathustra")) < len(skipped.encode("Zarathustra"))


def test_split_text_loses_nothing_and_respects_the_bound() -> None:
    text = "kurz\n" + "größere Wörter " * 40 + "\n" + "ü" * 100
    pieces = list(split_text(text, 64))
    assert all(0 < len(piece.encode()) <= 64 for piece in pieces)
    assert "".join(pieces) == text.replace("\n", "")


def test_too_little_text_is_an_error_that_says_so(documents: list[str]) -> None:
    with pytest.raises(DataError, match=r"cannot train a tokenizer of 8000 pieces on 100 documents"):
        train_tokenizer(TrainSentencePiece(), documents, vocab_size=8000)
    with pytest.raises(DataError, match="no training text"):
        train_tokenizer(TrainSentencePiece(), [], vocab_size=100)
    with pytest.raises(DataError, match="long_documents=split"):
        train_tokenizer(TrainSentencePiece(), ["a b " * 5000], vocab_size=100)


def test_limits_on_training_text(documents: list[str]) -> None:
    spec = TrainSentencePiece(max_documents=3)
    read = []
    train_tokenizer(spec, (read.append(text) or text for text in documents), vocab_size=100)
    assert len(read) <= 4
    read.clear()
    train_tokenizer(
        TrainSentencePiece(max_bytes=2000), (read.append(t) or t for t in documents), vocab_size=100
    )
    assert sum(map(len, read)) < 5000


def test_a_tokenizer_is_trained_once_for_the_same_text(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(JsonlData(files=[str(jsonl)]))
    spec = TrainSentencePiece()
    first = prepare_tokenizer(spec, source, vocab_size=120, separator="|")
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
        assert prepare_tokenizer(spec, source, vocab_size=120, separator="|").fingerprint == first.fingerprint
    jsonl.write_text(jsonl.read_text().replace("whale", "kraken"))
    assert prepare_tokenizer(spec, source, vocab_size=120, separator="|").fingerprint != first.fingerprint


def test_a_file_must_fit_the_architecture(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
    path = tmp_path / "own.model"
    train_tokenizer(TrainSentencePiece(), documents, vocab_size=150).save(path)
    source = open_source(JsonlData(files=[str(jsonl)]))
    spec = SentencePieceFile(file=str(path))
    assert prepare_tokenizer(spec, source, vocab_size=150, separator="").vocab_size == 150
    with pytest.raises(
        DataError, match=r"150 pieces but the architecture's vocab_size is 100; set vocab_size=150"
    ):
        prepare_tokenizer(spec, source, vocab_size=100, separator="")
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match=r"own\.model: this is not a SentencePiece model"):
        Tokenizer.load(path)


def test_lone_surrogates_are_replaced(documents: list[str]) -> None:
    tokenizer = train_tokenizer(TrainSentencePiece(), documents, vocab_size=100)
    assert tokenizer.encode("Ahab \ud800 sees") == tokenizer.encode("Ahab ? sees")


def test_ids_without_a_piece_have_no_text(documents: list[str]) -> None:
    tokenizer = train_tokenizer(TrainSentencePiece(), documents, vocab_size=200)
    ids = tokenizer.encode("the sea")
    assert tokenizer.decode([200, *ids, 5000, -1]) == "the sea"
