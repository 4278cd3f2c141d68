"""Seeded damage to files: to their bytes, to the documents and tensors in them, and to what stands at their place."""

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Mutation = Callable[[random.Random, Path], str]
Path_ = tuple[str | int, ...]

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    1.5,
    1e-3,
    1e308,
    -1e308,
    2**31,
    2**63,
    10**30,
    10**6,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "auto",
    "none",
    "1e3",
    "../..",
    "/",
    "a\nb",
    "\u202e\u0000",
    "ABAB",
    "AABB",
    [],
    {},
    [[]],
    [1, 2],
    [None],
    {"kind": "none"},
    {"kind": "dense"},
    {"kind": None},
    {"a": {"b": {"c": 1}}},
)
WORDS = (
    "kind",
    "extends",
    "version",
    "steps",
    "n_experts",
    "<<",
    "",
    "0",
    "a.b",
    "stages.0.repeats",
    "recipe",
    "kín",
)
LINES = (
    "\t- x",
    "extends: moeut_tiny",
    "extends: .",
    "extends: ..",
    "extends: /dev/zero",
    "extends: [moeut_tiny, dense_tiny]",
    "? [a, b]\n: c",
    "a: &a [*a]",
    "<<: *nothing",
    "<<: 3",
    "stages.0.layers.0.feedforward.n_experts: 0",
    "stages.-1: {}",
    "stages.0: null",
    "d_model.x.y: 1",
    "--- \nx: 1",
    "%YAML 9.9",
    "!!python/object/apply:os.system ['false']",
    "d_model: !!int x",
    "name: |\n  a\n b",
    "}",
    "]",
    '"',
    ": :",
    "- a",
)


def flip(dice: random.Random, data: bytes) -> bytes:
    """Some bits."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 8, 64))):
        if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(dice: random.Random, data: bytes) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def empty(dice: random.Random, data: bytes) -> bytes:
    return b""


def remove(dice: random.Random, data: bytes) -> bytes:
    begin = dice.randrange(len(data) + 1)
    return data[:begin] + data[begin + dice.randrange(1, 40) :]


def insert(dice: random.Random, data: bytes) -> bytes:
    begin = dice.randrange(len(data) + 1)
    junk = dice.choice(
        (
            dice.randbytes(9),
            b"\0",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"[" * 20_000,
            b"{a: " * 3_000,
            b"9" * 5_000,
            b"\r",
            b"\n\n",
        )
    )
    return data[:begin] + junk + data[begin:]


def reorder(dice: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        line = dice.choice(lines)
        lines.insert(dice.randrange(len(lines) + 1), line)
        lines.pop(dice.randrange(len(lines)))
    return b"".join(lines)


def write_line(dice: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    lines.insert(dice.randrange(len(lines) + 1), dice.choice(LINES).encode())
    return b"\n".join(lines) + b"\n"


BYTES = (flip, cut, empty, remove, insert, reorder)


def nodes(document: Any, path: Path_ = ()) -> list[Path_]:
    """Paths to everything in a document of maps and lists."""
    entries = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    return [path, *(below for key, value in entries for below in nodes(value, (*path, key)))]


def at(document: Any, path: Path_) -> Any:
    for key in path:
        document = document[key]
    return document


def change_document(dice: random.Random, document: Any, values: tuple[Any, ...] = VALUES) -> tuple[Any, str]:
    """One value, key or subtree of a document of maps and lists replaced, removed, renamed or moved."""
    paths = [path for path in nodes(document) if path]
    path = dice.choice(paths or [()])
    if not path:
        return dice.choice(values), "all replaced"
    parent, key = at(document, path[:-1]), path[-1]
    way = dice.choice(("value", "value", "value", "value", "delete", "rename", "add", "move", "number"))
    named = ".".join(map(str, path))
    if way == "delete":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[dice.choice((*WORDS, str(key) + "s", str(key).upper()))] = parent.pop(key)
    elif way == "add" and isinstance(parent, dict):
        parent[dice.choice(WORDS)] = dice.choice(values)
    elif way == "move":
        other = dice.choice(paths)
        parent[key] = None if other == path[: len(other)] else copy.deepcopy(at(document, other))
    elif way == "number" and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = dice.choice(
            (parent[key] + 1, parent[key] * 2, -parent[key], parent[key] - 1, parent[key] * 10**6, 0)
        )
    else:
        parent[key] = dice.choice(values)
        return document, f"{named} = {parent[key]!r:.40}"
    return document, f"{way} {named}"


def yaml_of(document: Any) -> str:
    """JSON with the words of YAML, so that any value can be written."""
    return json.dumps(document).replace("NaN", ".nan").replace("Infinity", ".inf")


def mutate_yaml(dice: random.Random, path: Path) -> str:
    """A YAML file: its bytes, or what it says."""
    data = path.read_bytes()
    way = dice.choice((*BYTES, write_line, write_line, *(10 * (None,))))
    if way is not None:
        path.write_bytes(way(dice, data))
        return way.__name__
    document, notes = yaml.safe_load(data), []
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        document, note = change_document(dice, document)
        notes.append(note)
        if not isinstance(document, dict):
            break
    path.write_text(yaml_of(document), encoding="utf-8", errors="surrogatepass")
    return "; ".join(notes)


def mutate_json(dice: random.Random, path: Path) -> str:
    """A JSON file, or one of the lines of a file of such lines."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    index = dice.randrange(len(lines))
    document, note = change_document(dice, json.loads(lines[index]))
    lines[index] = json.dumps(document)
    path.write_text("\n".join(lines) + "\n")
    return note


def mutate_bytes(dice: random.Random, path: Path) -> str:
    way = dice.choice(BYTES)
    path.write_bytes(way(dice, path.read_bytes()))
    return way.__name__


def mutate_place(dice: random.Random, path: Path) -> str:
    """Something else where the file was."""
    way = dice.choice(("gone", "folder", "loop", "dangling", "unreadable", "zeros", "fifo", "other"))
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    other = dice.choice(others).read_bytes() if others else b"{}"
    path.unlink()
    if way == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif way == "loop":
        path.symlink_to(path.name)
    elif way == "dangling":
        path.symlink_to("nowhere")
    elif way == "unreadable":
        path.symlink_to("/proc/self/mem")
    elif way == "zeros":
        path.symlink_to("/dev/zero")
    elif way == "fifo":
        os.mkfifo(path)
    elif way == "other":
        path.write_bytes(other)
    return way


def mutate_folder(dice: random.Random, folder: Path) -> str:
    """A folder of a run gone, empty, a file, or full of strangers."""
    way = dice.choice(("gone", "empty", "file", "loop", "strangers"))
    if way == "strangers":
        for name in (
            "step-99999999",
            "step-0000000x",
            "step-00000009.damaged",
            ".step-00000009.1.tmp",
            "step-00000007",
        ):
            if dice.random() < 0.5:
                (folder / name).mkdir(exist_ok=True)
            else:
                (folder / name).write_text("x")
        (folder / "step-99999999999999999999999").mkdir()
        return way
    shutil.rmtree(folder)
    if way == "empty":
        folder.mkdir()
    elif way == "file":
        folder.write_text("x")
    elif way == "loop":
        folder.symlink_to(folder.name)
    return way


TENSORS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda tensor: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 9),
    lambda tensor: torch.full_like(tensor, float("inf") if tensor.is_floating_point() else -1),
    lambda tensor: torch.zeros((*tensor.shape, 2), dtype=tensor.dtype),
    lambda tensor: torch.zeros(0),
    lambda tensor: tensor.to(torch.float64),
    lambda tensor: tensor.to(torch.int64),
    lambda tensor: tensor.to(torch.float16),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor > 0,
    lambda tensor: tensor.flatten().clone(),
)


def mutate_weights(dice: random.Random, path: Path) -> str:
    """Another tensor, name, header or architecture in a file of weights."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    way = dice.choice(("tensor", "tensor", "rename", "delete", "add", "header", "architecture"))
    note = ""
    if way == "tensor":
        which = dice.randrange(len(TENSORS))
        tensors[name] = TENSORS[which](tensors[name]).contiguous()
        note = str(which)
    elif way == "rename":
        tensors["x" + name] = tensors.pop(name)
    elif way == "delete":
        del tensors[name]
    elif way == "add":
        tensors["stranger"] = torch.zeros(3)
    elif way == "header":
        header = dice.choice(
            ({}, None, {"architecture": ""}, {"architecture": "[]"}, {"architecture": "name: \0"})
        )
    else:
        document, note = change_document(dice, yaml.safe_load(header["architecture"]))
        header = header | {"architecture": yaml_of(document)}
    save_file(tensors, path, metadata=header)
    return f"{way} {name} {note}"


def mutate_state(dice: random.Random, path: Path) -> str:
    """Another value in the state of training."""
    state = torch.load(path, weights_only=True)
    values = (
        *VALUES[:-8],
        torch.zeros(0),
        torch.zeros(3, 3),
        torch.full((), float("nan")),
        torch.zeros(5, dtype=torch.uint8),
        [],
        {},
    )
    state, note = change_document(dice, state, values)
    torch.save(state, path)
    return note


def sign(checkpoint: Path) -> None:
    """Make the checksums of a checkpoint those of its files."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    for name in meta["files"]:
        data = (checkpoint / name).read_bytes()
        meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "meta.json").write_text(json.dumps(meta))


def mutate_run(dice: random.Random, run: Path) -> str:
    """One thing in a run folder."""
    checkpoint = dice.choice(sorted((run / "checkpoints").glob("step-*")))
    signed: list[tuple[str, Mutation]] = [
        ("model.safetensors", mutate_weights),
        ("train_state.pt", mutate_state),
    ]
    if dice.random() < 0.35:
        name, mutation = dice.choice(
            (*signed, *signed, ("model.safetensors", mutate_bytes), ("train_state.pt", mutate_bytes))
        )
        note = mutation(dice, checkpoint / name)
        sign(checkpoint)
        if dice.random() < 0.7:  # it has to be this one that is read
            for other in run.glob("checkpoints/step-*"):
                if other != checkpoint:
                    shutil.rmtree(other)
        return f"{checkpoint.name}/{name}, signed: {note}"
    if dice.random() < 0.1:
        folder = dice.choice((run / "checkpoints", checkpoint, run / "validation", run / "plots"))
        if folder.is_dir():
            return f"{folder.name}: {mutate_folder(dice, folder)}"
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    path = dice.choice(files)
    ways: list[Mutation] = [mutate_bytes, mutate_bytes, mutate_place]
    if path.suffix in (".json", ".jsonl"):
        ways += 5 * [mutate_json]
    if path.suffix == ".yaml":
        ways += 5 * [mutate_yaml]
    return f"{path.relative_to(run)}: {dice.choice(ways)(dice, path)}"
