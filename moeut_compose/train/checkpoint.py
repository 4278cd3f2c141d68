"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-XXXXXXXX` with the weights, the rest of the training state and `meta.json`,
which holds a checksum of every other file. It is written under another name, flushed to disk and renamed;
then the pointer `latest` is moved. Reading verifies the checksums, and a damaged checkpoint makes way for the
one before.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import fsync_directory, hash_file, read_plain, write_atomically
from moeut_compose.train.errors import CheckpointError
from moeut_compose.train.parallel import like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from moeut_compose.spec.recipe import CheckpointSpec

WEIGHTS = "model.safetensors"
STATE = "train_state.pt"
META = "meta.json"
LATEST = "latest"
FORMAT = 1

_NAME = re.compile(r"step-(\d{8,18})")
_UNFIT = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def run(self) -> Path:
        """The run folder it lies in."""
        return self.path.parent.parent

    def architecture(self) -> str:
        """The resolved architecture that the weights carry, as YAML. Raises `CheckpointError` if there is none."""
        with _damage(self.path / WEIGHTS), safe_open(self.path / WEIGHTS, framework="pt") as file:
            return file.metadata()["architecture"]

    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into a model. Raises `CheckpointError` unless names and shapes are the model's."""
        with _damage(self.path / WEIGHTS):
            weights = load_file(self.path / WEIGHTS)
        copy_weights(weights, model, self.path)
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{self.path}: weight {name} is not finite, and training saves none that is not"
                )

    def load_state(self) -> dict[str, Any]:
        """Everything else that training needs to go on, on the CPU. Raises `CheckpointError`."""
        with _damage(self.path / STATE):
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True)

    @contextmanager
    def taken_up(self) -> Iterator[None]:
        """Around the use of what `load_state` returned: what does not fit there becomes a `CheckpointError`."""
        with _damage(self.path / STATE):
            yield


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What readers raise for content that is not what training wrote, though its checksum is right."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*_UNFIT, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} does not hold what training saves there ({reason})") from error


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, shared ones once."""
    saved = set(model.state_dict())
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}


def copy_weights(weights: dict[str, Tensor], model: nn.Module, origin: Path) -> None:
    """Copy tensors into a model by name. Raises `CheckpointError` unless names and shapes are the model's."""
    targets = weights_of(model)
    wrong = sorted(set(weights) ^ set(targets))
    wrong += [name for name in targets if name in weights and not _fits(weights[name], targets[name])]
    if wrong:
        shown = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise CheckpointError(
            f"{origin} does not fit the architecture; missing, surplus, or of another shape or kind: {shown}"
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(like(weights[name], target))


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape and value.is_floating_point() == target.is_floating_point()


def save_checkpoint(
    run: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    state: dict[str, Any],
    architecture: str,
    meta: dict[str, Any],
) -> Path:
    """Write the checkpoint of a step and point `latest` to it. Raises `CheckpointError` if the disk refuses.

    `weights` are those of `weights_of`, `architecture` is the resolved YAML, `state` whatever `Checkpoint.load_state`
    shall give back (tensors, numbers, strings, lists and dicts only), `meta` goes into `meta.json`.
    """
    final = step_folder(run, step)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        header = {"format": "pt", "architecture": architecture, "step": str(step)}
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        save_file(on_cpu, temporary / WEIGHTS, metadata=header)
        torch.save(state, temporary / STATE)
        files = {name: _flushed(temporary / name) for name in (WEIGHTS, STATE)}
        text = json.dumps({"format": FORMAT, "step": step, **meta, "files": files}, indent=1)
        write_atomically(temporary / META, text.encode())
        _replace_folder(temporary, final)
        write_atomically(final.parent / LATEST, f"{final.name}\n".encode())
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot save {final}: {error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _flushed(path: Path) -> dict[str, Any]:
    """Force a file to disk and describe it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _replace_folder(new: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.rename(old)
    new.rename(final)
    fsync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def tidy_checkpoints(run: Path) -> None:
    """Remove what a process that was killed while it saved or deleted has left, and put back what it was replacing."""
    for path in (run / "checkpoints").glob(".step-*"):
        final = path.with_name(path.name.split(".")[1])
        if path.suffix == ".old" and not final.exists():
            path.rename(final)
        elif path.suffix in (".tmp", ".old", ".gone"):
            shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = _NAME.match(path.name)
    assert match, path
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, by step; none of them is verified."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder. Raises `CheckpointError` naming what is wrong with it."""
    try:
        meta = json.loads(read_plain(path / META))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in meta["files"].items()}
        known = meta["format"] == FORMAT and {WEIGHTS, STATE} == set(files) and "data" in meta
        step = meta["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {META} is missing or damaged ({error})") from error
    if not known:
        raise CheckpointError(f"{path}: {META} is not of format {FORMAT}")
    if type(step) is not int or step < 0 or (_NAME.match(path.name) and step != step_of(path)):
        raise CheckpointError(f"{path}: {META} is of another checkpoint: its step is {step!r:.20}")
    for name, (size, digest) in files.items():
        try:
            whole = (path / name).stat().st_size == size and hash_file(path / name) == digest
        except (OSError, DataError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
        if not whole:
            raise CheckpointError(f"{path}: {name} is damaged: its checksum differs from the one in {META}")
    return Checkpoint(path, meta)


def find_checkpoint(run: Path, *, warn: Callable[[str], None], set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if a run has none.

    Newer, damaged ones are reported through `warn` and with `set_aside` renamed to `step-XXXXXXXX.damaged`.
    Raises `CheckpointError` if there are some and all are damaged.
    """
    damaged: list[Path] = []
    for path in list_checkpoints(run)[::-1]:
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; trying an earlier checkpoint")
            damaged.append(path)
            continue
        for other in damaged if set_aside else ():
            other.rename(_free_name(f"{other}.damaged"))
        return found
    if damaged:
        raise CheckpointError(f"{run}: none of {len(damaged)} checkpoints is whole")
    return None


def _free_name(name: str) -> Path:
    """The name, with a number behind it if something else has it."""
    names = (Path(name if number == 1 else f"{name}.{number}") for number in itertools.count(1))
    return next(path for path in names if not os.path.lexists(path))


def prune_checkpoints(run: Path, spec: CheckpointSpec) -> list[Path]:
    """Delete what the recipe does not keep; the newest always stays."""
    checkpoints = list_checkpoints(run)
    newest = set(checkpoints[-spec.keep_last :])
    removed = []
    for path in checkpoints:
        step = step_of(path)
        if path in newest or (spec.keep_every is not None and step % spec.keep_every == 0):
            continue
        hidden = path.with_name(f".{path.name}.{os.getpid()}.gone")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        removed.append(path)
    return removed
