"""Token files: the documents in order, keyed by content, written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeut_compose.data import tokenising
from moeut_compose.data import tokens as module
from moeut_compose.data.errors import DataError
from moeut_compose.data.prepare import prepare_data
from moeut_compose.data.shards import StreamShard
from moeut_compose.data.sources import open_source
from moeut_compose.data.tokenizer import Tokenizer, train_tokenizer, with_separator
from moeut_compose.data.tokens import open_tokens, prepare_tokens, save_head, write_tokens
from moeut_compose.spec.recipe import BatchSpec, JsonlData, RecipeSpec, TrainSentencePiece


def at_hand(*documents: str) -> StreamShard:
    return StreamShard(lambda: documents)


@pytest.fixture
def tokenizer(documents: list[str]) -> Tokenizer:
    return train_tokenizer(TrainSentencePiece(), with_separator(documents, "<STORY_SEP>"), vocab_size=200)


def test_documents_are_encoded_one_by_one_and_joined(
    tokenizer: Tokenizer, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "_CHUNK_CHARACTERS", 1500)
    write_tokens(tmp_path / "tokens", [at_hand("", *documents, "")], tokenizer, separator="<STORY_SEP>")
    tokens = open_tokens(tmp_path / "tokens")
    expected = [token for text in documents for token in tokenizer.encode(text + "<STORY_SEP>")]
    assert tokens.ids.tolist() == expected
    assert tokens.ids.dtype == np.uint16
    assert tokens.index.n_documents == len(documents)
    assert tokens.index.n_bytes == sum(len(f"{text}<STORY_SEP>".encode()) for text in documents)


def test_windows_share_one_token(tokenizer: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [at_hand(*documents)], tokenizer, max_tokens=101)
    tokens = open_tokens(tmp_path / "tokens")
    assert tokens.n_windows(20) == 5
    windows = tokens.windows([0, 1, 4], 20)
    assert windows.shape == (3, 21)
    assert windows.dtype == np.int64
    assert windows[0, -1] == windows[1, 0]
    assert windows[2].tolist() == tokens.ids[80:101].tolist()


def test_max_tokens_stops_reading(tokenizer: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    read: list[str] = []
    endless = (read.append(text) or text for _ in range(10**9) for text in documents)
    write_tokens(tmp_path / "tokens", [StreamShard(lambda: endless)], tokenizer, max_tokens=1000)
    assert open_tokens(tmp_path / "tokens").index.n_tokens == 1000
    assert len("".join(read)) < 2 * tokenising._CHUNK_CHARACTERS


def test_tokens_are_made_once_and_again_when_anything_changes(
    tokenizer: Tokenizer, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(JsonlData(files=[str(jsonl)]))
    made: list[Path] = []
    original = write_tokens
    monkeypatch.setattr(
        module, "write_tokens", lambda folder, *a, **k: made.append(folder) or original(folder, *a, **k)
    )
    for _ in range(2):
        prepare_tokens(source, "train", tokenizer, separator="|")
    assert len(made) == 1
    prepare_tokens(source, "train", tokenizer, separator="||")
    prepare_tokens(source, "validation", tokenizer, separator="|")
    prepare_tokens(source, "train", tokenizer, separator="|", max_tokens=10)
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    prepare_tokens(source, "train", tokenizer, separator="|")
    assert len(set(made)) == 5


def test_a_failure_leaves_nothing_behind(tokenizer: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    def failing():
        yield from documents
        raise DataError("the source broke")

    folder = tmp_path / "made" / "tokens"
    with pytest.raises(DataError, match="the source broke"):
        write_tokens(folder, [StreamShard(failing)], tokenizer)
    assert list(folder.parent.iterdir()) == []


def test_a_truncated_file_is_noticed(tokenizer: Tokenizer, jsonl: Path, cache_folder: Path) -> None:
    source = open_source(JsonlData(files=[str(jsonl)]))
    prepare_tokens(source, "train", tokenizer, separator="")
    (path,) = cache_folder.rglob("tokens.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="delete that folder to make it again"):
        prepare_tokens(source, "train", tokenizer, separator="")


def test_the_head_of_a_file(tokenizer: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    write_tokens(tmp_path / "all", [at_hand(*documents)], tokenizer)
    whole = open_tokens(tmp_path / "all")
    save_head(whole, tmp_path / "head", 300)
    head = open_tokens(tmp_path / "head")
    assert head.ids.tolist() == whole.ids[:300].tolist()
    assert head.index.n_bytes == pytest.approx(whole.index.n_bytes * 300 / whole.index.n_tokens, abs=1)


def test_bytes_are_those_of_the_text_that_is_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Half of the text has longer words: an average over all of it would be wrong for either half."""
    texts = ["a b c d e f g h " * 40, "the of and the of and to " * 40]
    write_tokens(tmp_path / "all", [at_hand(*texts)], tokenizer)
    whole = open_tokens(tmp_path / "all", tokenizer)
    border = len(tokenizer.encode(texts[0]))
    first, second = whole.n_bytes(0, border), whole.n_bytes(border, whole.index.n_tokens)
    assert first + second == pytest.approx(whole.index.n_bytes)
    assert first == pytest.approx(len(texts[0].encode()), rel=0.02)
    save_head(whole, tmp_path / "head", border)
    assert open_tokens(tmp_path / "head").index.n_bytes == round(first)
    blind = open_tokens(tmp_path / "all")
    assert abs(blind.n_bytes(0, border) / first - 1) > 0.1


def recipe(jsonl: Path, **changes) -> RecipeSpec:
    data = JsonlData(files=[str(jsonl)], validation_fraction=0.1)
    return RecipeSpec(name="test", steps=1, data=data, **changes)


def test_prepare_data_keeps_the_tokenizer_of_a_resumed_run(jsonl: Path, tokenizer: Tokenizer) -> None:
    data = prepare_data(
        recipe(jsonl, batch=BatchSpec(size=4)), vocab_size=100, context=16, tokenizer=tokenizer
    )
    assert data.tokenizer is tokenizer
    assert data.validation.index.n_tokens > 16


def test_too_little_text_for_a_batch(jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"order: streams needs 5000"):
        prepare_data(recipe(jsonl, batch=BatchSpec(size=5000)), vocab_size=100, context=16)
    with pytest.raises(DataError, match=r"less than one window of 4000"):
        prepare_data(recipe(jsonl, order="shuffled"), vocab_size=100, context=4000)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": -1},
        {"n_tokens": "9"},
        {"n_documents": None},
        {"n_bytes": 1.5},
        {"dtype": "object"},
        {"dtype": 3},
        {"more": 1},
    ],
)
def test_a_damaged_index_is_noticed(
    tokenizer: Tokenizer, documents: list[str], tmp_path: Path, change: dict
) -> None:
    write_tokens(tmp_path / "tokens", [at_hand(*documents)], tokenizer)
    path = tmp_path / "tokens" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is not a token file"):
        open_tokens(tmp_path / "tokens")


def test_ids_outside_the_vocabulary_are_noticed(
    tokenizer: Tokenizer, documents: list[str], tmp_path: Path
) -> None:
    write_tokens(tmp_path / "tokens", [at_hand(*documents)], tokenizer)
    text = open_tokens(tmp_path / "tokens")
    text.check(tokenizer.vocab_size)
    with pytest.raises(DataError, match="not those of a text"):
        text.check(int(text.ids.max()))
