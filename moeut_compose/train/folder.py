"""The run folder: where it is, what it holds, and who may write to it."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from moeut_kernels import tuned_tiles

from moeut_compose import __version__
from moeut_compose.data.files import read_plain, write_atomically
from moeut_compose.train.checkpoint import list_checkpoints
from moeut_compose.train.errors import RunError, RunNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ARCHITECTURE = "architecture.yaml"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.model"
ENVIRONMENT = "environment.json"
VALIDATION = "validation"
PLOTS = "plots"
LOCK = ".lock"
_BEGINNING = {ARCHITECTURE, ENVIRONMENT, TOKENIZER, VALIDATION}
"""What is written before the recipe, which makes a folder a run."""

Resume = Literal["auto", "none"] | Path


def runs_root() -> Path:
    """Where new runs go: `MOEUT_COMPOSE_RUNS`, or `runs` in the working directory."""
    return Path(os.environ.get("MOEUT_COMPOSE_RUNS") or "runs").expanduser()


def new_folder(name: str) -> Path:
    """A folder name that is not taken: `runs/<time>-<name>`."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name.replace('/', '-')}"
    root = runs_root()
    taken = 1
    folder = root / stem
    while folder.exists():
        taken += 1
        folder = root / f"{stem}-{taken}"
    return folder


def is_run(folder: Path) -> bool:
    return (folder / ARCHITECTURE).is_file() and (folder / RECIPE).is_file()


def split_path(path: Path) -> tuple[Path, Path | None]:
    """The run folder that a path means and, if it names one of its checkpoints, that checkpoint.

    Raises `RunNotFound` if it is neither.
    """
    path = path.expanduser()
    if is_run(path):
        return path, None
    if path.parent.name == "checkpoints" and is_run(path.parent.parent):
        if path.name == "latest":
            return path.parent.parent, None
        if path.is_dir():
            return path.parent.parent, path
    what = "does not exist" if not path.exists() else f"holds no {ARCHITECTURE} and {RECIPE}"
    raise RunNotFound(f"{path} is neither a run folder nor a checkpoint of one: it {what}")


def resume_folder(out: Path | None, resume: Resume) -> Path | None:
    """The existing run that `train(out=out, resume=resume)` would go on with; None for a new run.

    Its `recipe.yaml` and `architecture.yaml` are what to use where a command names no others.
    """
    if resume == "none":
        return None
    if isinstance(resume, Path):
        return split_path(resume)[0]
    return out if out is not None and is_run(out) else None


def check_empty(folder: Path) -> None:
    """Raises `RunError` if something is there already, unless it is what a run left that ended before it began."""
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    begun = _BEGINNING if LOCK in there else set()
    if any(not name.startswith(".") for name in there - begun):
        hint = (
            "--resume auto goes on with this run"
            if list_checkpoints(folder)
            else "name another folder in --out"
        )
        raise RunError(f"{folder} is not empty; {hint}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training into the same folder, which is created if needed.

    The lock belongs to the process and goes with it, however it ends. Raises `RunError` if another process
    holds it or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise RunError(f"cannot write to the run folder {folder}: {error.strerror or error}") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows
            pass
        except OSError as error:
            raise RunError(f"another process is training in {folder}") from error
        yield


def write_environment(folder: Path, argv: Sequence[str], device: torch.device) -> None:
    """Record what a run was made with; a resumed run adds a record."""
    path = folder / ENVIRONMENT
    try:
        records = list(json.loads(read_plain(path))["starts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        records = []
    content = {"starts": [*records, environment(argv, device)]}
    write_atomically(path, json.dumps(content, indent=1).encode())


def environment(argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Versions, hardware and the command line."""
    packages = ("torch", "triton", "numpy", "sentencepiece", "safetensors", "datasets", "pydantic")
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(argv),
        "moeut_compose": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "device": str(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MOEUT_COMPOSE_", "MOEUT_KERNELS_"))
        },
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        tuned = tuned_tiles.in_use(device)
        found["tuned_tiles"] = None if tuned is None else {"file": str(tuned.path), "tiles": tuned.tiles}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
