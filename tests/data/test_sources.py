"""Sources give every document once, hold some out, and say what is wrong with a file."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from moeut_compose.data.errors import DataError
from moeut_compose.data.hub import take_turns
from moeut_compose.data.sources import builtin_corpus, open_source
from moeut_compose.spec.recipe import BuiltinData, JsonlData, TextData


def test_held_out_documents_are_a_partition(jsonl: Path, documents: list[str]) -> None:
    source = open_source(JsonlData(files=[str(jsonl)], validation_fraction=0.2))
    train, held_out = list(source.documents("train")), list(source.documents("validation"))
    assert sorted(train + held_out) == sorted(documents)
    assert 5 < len(held_out) < 40
    assert not set(train) & set(held_out)


def test_validation_files_leave_training_files_whole(
    jsonl: Path, documents: list[str], tmp_path: Path
) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "a held-out text"}\n')
    source = open_source(JsonlData(files=[str(jsonl)], validation_files=[str(tmp_path / "held.jsonl")]))
    assert list(source.documents("train")) == documents
    assert list(source.documents("validation")) == ["a held-out text"]


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_packed_files(tmp_path: Path, suffix: str, opener) -> None:
    path = tmp_path / f"packed.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write('{"text": "größer"}\n\n{"text": "than"}\n')
    source = open_source(JsonlData(files=[str(path)], validation_files=[str(path)]))
    assert list(source.documents("train")) == ["größer", "than"]


def write_records(path: Path, documents: list[str], n_bytes: int | None = None) -> Path:
    """Documents in the format that the name says; `n_bytes` leaves so many of the file."""
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
    match path.suffix:
        case ".parquet":
            parquet.write_table(
                pyarrow.table({"id": range(len(documents)), "text": documents}), path, row_group_size=40
            )
        case ".zst":
            half = len(lines) // 2  # two frames, as parallel packers write them
            path.write_bytes(
                b"".join(
                    pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:half], lines[half:])
                )
            )
        case suffix:
            pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".jsonl": bytes}[suffix]
            path.write_bytes(pack(lines))
    path.write_bytes(path.read_bytes()[:n_bytes])
    return path


RECORDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"]


def test_every_format_gives_the_same_documents(tmp_path: Path, documents: list[str]) -> None:
    documents = ["größer 鯨", "", *documents]
    for number, name in enumerate(RECORDS):
        write_records(tmp_path / f"{number}-{name}", documents)
    (tmp_path / "held.jsonl").write_text("")
    held = [str(tmp_path / "held.jsonl")]
    source = open_source(JsonlData(files=[str(tmp_path / "?-*")], validation_files=held))
    assert [list(shard.documents()) for shard in source.shards("train")] == [documents] * len(RECORDS)
    assert list(source.documents("train")) == documents * len(RECORDS)
    for shard in source.shards("train"):
        assert shard.n_read() == 0
        assert len(list(shard.documents())) == len(documents)
        assert shard.n_read() == shard.n_bytes()


@pytest.mark.parametrize("name", RECORDS[1:])
@pytest.mark.parametrize("n_bytes", [0.02, 0.5, 0.98])
def test_a_truncated_shard_is_named(tmp_path: Path, documents: list[str], name: str, n_bytes: float) -> None:
    size = write_records(tmp_path / name, documents).stat().st_size
    path = write_records(tmp_path / name, documents, int(size * n_bytes))
    source = open_source(JsonlData(files=[str(path)], validation_files=[str(path)]))
    with pytest.raises(DataError, match=rf"{name}: cannot be read as (text|Parquet)"):
        list(source.documents("train"))


def test_damage_inside_a_parquet_file_is_named(tmp_path: Path, documents: list[str]) -> None:
    path = write_records(tmp_path / "a.parquet", documents)
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    source = open_source(JsonlData(files=[str(path)], validation_files=[str(path)]))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        list(source.documents("train"))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ({"body": ["a"]}, r"a\.parquet: no column 'text' \(found: body\); set data\.field"),
        ({"text": ["a", None]}, r"a\.parquet: row 2: text is not a text but NoneType"),
        ({"text": [1]}, r"a\.parquet: row 1: text is not a text but int"),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, column: dict, says: str) -> None:
    parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    files = [str(tmp_path / "a.parquet")]
    with pytest.raises(DataError, match=says):
        list(open_source(JsonlData(files=files, validation_files=files)).documents("train"))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files = [str(write_records(tmp_path / name, ["one"]))]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(open_source(JsonlData(files=files, validation_files=files)).documents("train"))


def test_the_end_of_a_text_file_is_held_out(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    source = open_source(TextData(files=[str(tmp_path / "*.txt")], validation_fraction=0.1))
    (train,), (held_out,) = source.documents("train"), source.documents("validation")
    assert train + held_out == "".join(lines)
    assert train.endswith("\n")
    assert 80 < held_out.count("\n") < 120


def test_text_documents_by_line_and_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    for unit, expected in {"line": ["one", "two", "three"], "paragraph": ["one\ntwo", "three"]}.items():
        source = open_source(TextData(files=[str(path)], validation_files=[str(path)], document=unit))
        assert list(source.documents("train")) == expected


def test_fingerprint_follows_content_and_not_the_name(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("same")
    b.write_text("same")
    first, second = (open_source(TextData(files=[str(path)])) for path in (a, b))
    assert first.fingerprint("train") == second.fingerprint("train") != first.fingerprint("validation")
    b.write_text("other")
    assert first.fingerprint("train") != second.fingerprint("train")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\nnonsense\n', r"bad\.jsonl:2:1: not JSON"),
        (b'{"body": "a"}\n', r"bad\.jsonl:1: no key 'text' \(found: body\); set data\.field"),
        (b"[1]\n", r"bad\.jsonl:1: no key 'text'"),
        (b'{"text": 3}\n', r"bad\.jsonl:1: text is not a text but int"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_bad_jsonl_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    source = open_source(JsonlData(files=[str(path)], validation_files=[str(path)]))
    with pytest.raises(DataError, match=says):
        list(source.documents("train"))


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    for name, content in {"a.jsonl.xz": b"no archive", "b.jsonl.gz": gzip.compress(b"x" * 9999)[:40]}.items():
        path = tmp_path / name
        path.write_bytes(content)
        source = open_source(JsonlData(files=[str(path)], validation_files=[str(path)]))
        with pytest.raises(DataError, match=name):
            list(source.documents("train"))


def test_a_pattern_without_files_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no file matches 'missing/\*\.txt'"):
        open_source(TextData(files=["missing/*.txt"]))


def test_the_builtin_corpus_is_the_one_its_manifest_describes() -> None:
    train, validation = builtin_corpus("classics")
    manifest = json.loads((train.parent / "manifest.json").read_text())
    source = open_source(BuiltinData())
    for part, path in (("train", train), ("validation", validation)):
        recorded = manifest["files"][path.name]
        assert recorded["sha256"] in source.fingerprint(part)
        assert sum(1 for _ in source.documents(part)) == recorded["documents"]


def test_taking_turns_goes_on_when_a_stream_ends() -> None:
    assert list(take_turns([iter("abc"), iter("x"), iter("12")])) == ["a", "x", "1", "b", "2", "c"]
