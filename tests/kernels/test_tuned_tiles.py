"""Files of tuned tiles: what is written is read, what is damaged or foreign is left alone, and `tile` obeys."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moeut_kernels import tuned_tiles
from moeut_kernels.bench.parts import CANDIDATES
from moeut_kernels.tuned_tiles import Malformed, Setting, parse, path_of, read, write

triton_tiles = pytest.importorskip("moeut_kernels.triton_tiles")

HERE = Setting("Pretend GPU 80GB", "2.11.0+cu130", "3.6.0", "0123456789ab")
WALK, WEIGHT = (128, 64, 0, 4, 3), (256, 64, 64, 4, 4)
TRIALS = [{"product": "walk", "tile": list(WALK), "ms": 0.123, "status": "wins", "why": None}]
ROWS = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))

powers = st.integers(4, 8).map(lambda exponent: 2**exponent)
tiles = st.tuples(
    powers, powers, st.one_of(st.just(0), powers), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 8)
)
tables = st.dictionaries(st.text(max_size=12), tiles, max_size=5)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["format", "tiles", "device", "torch", "walk"]), inner, max_size=4)
    ),
)


def forget() -> None:
    for function in (
        tuned_tiles._read_once,
        tuned_tiles._warn,
        triton_tiles._half_precision,
        triton_tiles._device_class,
    ):
        function.cache_clear()


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A large GPU that is not there, and an empty cache."""
    monkeypatch.setenv("MOEUT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEUT_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(tuned_tiles, "setting_of", lambda device: HERE)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    forget()
    yield
    forget()


def content_of(found: dict, setting: Setting = HERE) -> bytes:
    path_of(setting).unlink(missing_ok=True)
    return write(setting, found, TRIALS, list(found)).read_bytes()


@given(table=tables)
def test_what_is_written_is_read(table: dict) -> None:
    assert parse(content_of(table), HERE) == table


@given(data=st.data(), table=tables)
def test_a_damaged_file_is_refused_or_says_the_same(data: st.DataObject, table: dict) -> None:
    """Every flipped, lost or added piece: never an exception but ours, never another tile."""
    content = bytearray(content_of(table))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 20))
        content[at : at + length] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"1", b"0", b"9", b" "])
        )
    try:
        found = parse(bytes(content), HERE)
    except Malformed:
        return
    assert found == table


@given(documents)
def test_any_other_json_is_refused(document: object) -> None:
    with pytest.raises(Malformed):
        parse(json.dumps(document).encode(), HERE)


def test_every_beginning_of_a_file_is_refused() -> None:
    content = content_of({"walk": WALK, "weight": WEIGHT})
    for length in range(len(content)):
        with pytest.raises(Malformed):
            parse(content[:length], HERE)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_what_json_cannot_read_is_refused(content: bytes) -> None:
    with pytest.raises(Malformed):
        parse(content, HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "Other GPU"}, "its device is 'Pretend GPU 80GB', not 'Other GPU'"),
        ({"torch": "2.12.0"}, "its torch is"),
        ({"triton": "3.7.0"}, "its triton is"),
        ({"kernels": "ba9876543210"}, "its kernels is '0123456789ab'"),
    ],
)
def test_what_was_measured_elsewhere_is_refused(change: dict, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse(content_of({"walk": WALK}), replace(HERE, **change))


def test_a_later_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_tiles, "FORMAT", 2)
    content = content_of({"walk": WALK})
    monkeypatch.undo()
    with pytest.raises(Malformed, match="its format is 2, not 1"):
        parse(content, HERE)


@pytest.mark.parametrize(
    "sizes",
    [
        (128, 64, 0, 4), (128, 64, 0, 4, True), (128, 64, 0, 4, 3.0), (96, 64, 0, 4, 3), (128, 8, 0, 4, 3),
        (128, 64, 48, 4, 3), (128, 64, 0, 3, 3), (128, 64, 0, 4, 0), (-128, 64, 0, 4, 3), "walks", None,
    ],
)  # fmt: skip
def test_no_tile(sizes: object) -> None:
    with pytest.raises(Malformed, match="walk"):
        tuned_tiles.check("walk", sizes)


def test_candidates_are_tiles_of_the_kind_that_is_static() -> None:
    for product, candidates in CANDIDATES.items():
        for static in (triton_tiles._LARGE[product], triton_tiles._SMALL[product]):
            for sizes in candidates:
                assert tuned_tiles.check(product, sizes) == sizes
                assert (sizes[2] == 0) == (static.depth == 0), "walks have no depth"


def test_winners_of_other_products_stay() -> None:
    write(HERE, {"walk": WALK, "weight": WEIGHT}, TRIALS, ["walk", "weight"])
    path = write(HERE, {}, [], ["walk"])  # the static walk was faster this time
    assert read(path, HERE) == {"weight": WEIGHT}
    path.write_text("{")
    assert read(write(HERE, {"walk": WALK}, TRIALS, ["walk"]), HERE) == {"walk": WALK}


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(HERE, {"walk": WALK}, TRIALS, ["walk"])

    def refuse(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write(HERE, {"weight": WEIGHT}, TRIALS, ["weight"])
    assert read(path, HERE) == {"walk": WALK}
    assert list(path.parent.iterdir()) == [path]


def test_one_file_for_each_device_and_version(tmp_path: Path) -> None:
    assert path_of(HERE) == tmp_path / "cache" / "Pretend-GPU-80GB_torch-2.11.0-cu130_triton-3.6.0.json"
    others = [replace(HERE, device="../x"), replace(HERE, torch="2.12"), replace(HERE, triton="3.7")]
    paths = {path_of(HERE), *map(path_of, others)}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {tmp_path / "cache"}


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("MOEUT_COMPOSE_CACHE", str(tmp_path / "compose"))
    assert tuned_tiles.folder() == tmp_path / "cache"
    monkeypatch.delenv("MOEUT_KERNELS_CACHE")
    assert tuned_tiles.folder() == tmp_path / "compose" / "kernels"
    monkeypatch.delenv("MOEUT_COMPOSE_CACHE")
    assert tuned_tiles.folder() == tmp_path / "user" / "moeut_kernels"


def test_a_product_takes_the_tuned_tile() -> None:
    assert triton_tiles.tile("walk", ROWS) == triton_tiles._LARGE["walk"]
    write(HERE, {"walk": WALK}, TRIALS, ["walk"])
    assert triton_tiles.tile("walk", ROWS) == triton_tiles._LARGE["walk"], (
        "a process that runs keeps its tiles"
    )
    forget()
    assert triton_tiles.tile("walk", ROWS) == triton_tiles.Tile(*WALK)
    assert triton_tiles.tile("weight", ROWS) == triton_tiles._LARGE["weight"]
    exact = SimpleNamespace(dtype=torch.float32, device=ROWS.device)
    assert triton_tiles.tile("weight", exact) == triton_tiles._FLOAT32["weight"]
    with triton_tiles.override("walk", triton_tiles.Tile(16, 16, 0, 1, 1)):
        assert triton_tiles.tile("walk", ROWS).rows == 16
    assert triton_tiles.static_tiles(ROWS.device)["walk"] == triton_tiles._LARGE["walk"]


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write(HERE, {"walk": WALK}, TRIALS, ["walk"])
    calls = []
    monkeypatch.setattr(tuned_tiles, "read", lambda *a: calls.append(a) or {"walk": WALK})
    for _ in range(3):
        assert triton_tiles.tile("walk", ROWS).rows == 128
        assert tuned_tiles.in_use(ROWS.device).tiles == {"walk": WALK}
    assert len(calls) == 1


@pytest.mark.parametrize(("value", "rows"), [("0", 64), ("off", 64), (" False", 64), ("1", 128), ("", 128)])
def test_the_switch(monkeypatch: pytest.MonkeyPatch, value: str, rows: int) -> None:
    write(HERE, {"walk": WALK}, TRIALS, ["walk"])
    monkeypatch.setenv("MOEUT_KERNELS_TUNED", value)
    assert triton_tiles.tile("walk", ROWS).rows == rows
    assert (tuned_tiles.in_use(ROWS.device) is None) == (rows == 64)


@pytest.mark.parametrize("damage", ["torn", "foreign", "long", "folder"])
def test_a_file_that_cannot_be_used_is_warned_about_once(damage: str) -> None:
    path = write(HERE, {"walk": WALK}, TRIALS, ["walk"])
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "foreign":
        path.write_text(path.read_text().replace("Pretend", "Another"))
    elif damage == "long":
        path.write_bytes(b" " * (tuned_tiles.MOST_BYTES + 1))
    else:
        path.unlink()
        path.mkdir()
    with pytest.warns(
        UserWarning, match=r"the tuned tiles in .* are ignored: .*; delete the file, or tune"
    ) as seen:
        assert triton_tiles.tile("walk", ROWS) == triton_tiles._LARGE["walk"]
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_tiles.in_use(ROWS.device) is None
        assert triton_tiles.tile("weight", ROWS) == triton_tiles._LARGE["weight"]


def test_no_device_but_cuda_has_tuned_tiles() -> None:
    write(HERE, {"walk": WALK}, TRIALS, ["walk"])
    assert tuned_tiles.in_use(torch.device("cpu")) is None


def test_the_setting_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend GPU 80GB")
    setting = tuned_tiles.setting_of(ROWS.device)
    assert setting.device == "Pretend GPU 80GB"
    assert type(setting.torch) is str
    assert setting.torch == torch.__version__
    assert len(setting.kernels) == 12
    assert parse(content_of({"walk": WALK}, setting), setting) == {"walk": WALK}
