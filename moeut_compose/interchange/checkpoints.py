"""Checkpoints of the original code as runs of ours.

The clean release saves what its user saves: a state dict, alone or in a dictionary, with the arguments of
`MoEUTLM` beside it. The training code saves everything of a run in one file; its weights, its command line
and its step are taken over, optimiser and data position are not: an imported run can be used, not gone on
with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.data.files import write_atomically
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.interchange.arguments import config_from_arguments, recipe_from_arguments
from moeut_compose.interchange.configs import spec_from_config
from moeut_compose.interchange.names import COUNTER, Origin, to_original, to_ours
from moeut_compose.interchange.unpickle import load_safely
from moeut_compose.spec.io import dump_yaml, load_recipe
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import folder as run_folder
from moeut_compose.train.checkpoint import copy_weights, save_checkpoint, weights_of
from moeut_compose.train.errors import CheckpointError, RunNotFound

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict")
CONFIG_KEYS = ("config", "args", "hparams")
CONTEXT = 1024
"""Context of the published runs, for checkpoints of the clean release, which has no such setting."""


@dataclass(frozen=True)
class Original:
    """A checkpoint of the original code, read and not yet translated."""

    origin: Origin
    path: Path
    weights: dict[str, Tensor]
    config: dict[str, Any]
    """In the words of `spec_from_config`."""
    context: int = CONTEXT
    step: int = 0
    recipe: tuple[str, list[str]] = ("paper", [])
    """A recipe's name and overrides."""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """A name for the run: that of the file, or of the folder around files that are all called alike."""
        generic = re.fullmatch(r"model(-\d+)?|pytorch_model|checkpoint|weights", self.path.stem)
        stem = self.path.parent.name if generic else self.path.stem
        return re.sub(r"\W+", "_", stem).strip("_") or self.origin.replace("-", "_")

    def spec(self) -> ModelSpec:
        """The architecture. Raises `CheckpointError` if the configuration describes none."""
        try:
            return spec_from_config(
                self.config,
                origin=self.origin,
                vocab_size=self.weights["embedding.weight"].shape[0],
                context_length=self.context,
                name=self.name,
            )
        except KeyError as error:
            raise CheckpointError(f"{self.path} holds no {error.args[0]}") from error
        except (ValueError, ValidationError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def read_original(path: str | Path, *, origin: Origin, config: str | Path | None = None) -> Original:
    """Read a checkpoint of one of the original repositories, without running anything that it brings along.

    path: a file, or a folder with one. config: a JSON or YAML file with the arguments of `MoEUTLM`, for a
    clean checkpoint that has none in it or beside it. Raises `CheckpointError`, `RunNotFound` if there is no
    such path.
    """
    file = _checkpoint_file(Path(path).expanduser())
    if origin == "moeut-training":
        return _read_training(file)
    return _read_clean(file, None if config is None else Path(config))


def import_checkpoint(original: Original, out: Path, *, tokenizer: Tokenizer | None = None) -> ModelSpec:
    """Write a run folder that can be evaluated, generated from and exported, and return its architecture.

    Raises `CheckpointError` where weights and configuration do not fit, `RunError` if `out` is not empty.
    """
    run_folder.check_empty(out)
    spec = original.spec()
    model = model_of(original, spec)
    base, overrides = original.recipe
    recipe = load_recipe(base, [*overrides, f"name={original.name}", "description=Imported"])
    write_run(
        out,
        spec=spec,
        recipe=recipe,
        model=model,
        step=original.step,
        tokenizer=tokenizer,
        imported={"format": original.origin, "path": str(original.path.absolute())},
    )
    return spec


def write_run(
    out: Path,
    *,
    spec: ModelSpec,
    recipe: RecipeSpec,
    model: LanguageModel,
    step: int,
    tokenizer: Tokenizer | None,
    imported: dict[str, str],
) -> None:
    """Write a run folder around a model that was trained elsewhere; `imported` says where it came from."""
    out.mkdir(parents=True, exist_ok=True)
    architecture = dump_yaml(spec)
    write_atomically(out / run_folder.RECIPE, dump_yaml(recipe).encode())
    write_atomically(out / run_folder.ARCHITECTURE, architecture.encode())
    run_folder.write_environment(out, [], torch.device("cpu"))
    if tokenizer is not None:
        tokenizer.save(out / run_folder.TOKENIZER)
    meta = {"data": None, "imported": imported}
    save_checkpoint(out, step=step, weights=weights_of(model), state={}, architecture=architecture, meta=meta)


def model_of(original: Original, spec: ModelSpec) -> LanguageModel:
    """The model with the checkpoint's weights. Raises `CheckpointError` where they do not fit."""
    try:
        weights = to_ours(original.weights, n_heads=spec.stages[0].layers[0].mixer.n_heads)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{original.path}: {error}") from error
    model = build_model(spec, init=False)
    copy_weights(weights, model, original.path)
    return model


def original_weights(model: LanguageModel, spec: ModelSpec, *, origin: Origin) -> dict[str, Tensor]:
    """The weights of a model under the names of the original code: a state dict that it loads.

    The training code also saves usage counters, which it recreates. Raises ValueError for a model that it
    cannot hold.
    """
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return to_original(ours, spec, origin=origin)


def _checkpoint_file(path: Path) -> Path:
    """The file itself; in a folder, the newest `model-STEP.pth` or the only checkpoint."""
    if not path.is_dir():
        if not path.is_file():
            raise RunNotFound(f"{path} does not exist")
        return path
    places = [path, path / "checkpoint"]
    numbered = {
        int(found.group(1)): file
        for place in places
        for file in place.glob("model-*.pth")
        if (found := re.fullmatch(r"model-(\d+)", file.stem))
    }
    if numbered:
        return numbered[max(numbered)]
    suffixes = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path} should hold one checkpoint; it holds {names}; name a file")
    return files[0]


def _read_training(path: Path) -> Original:
    data = load_safely(path)
    try:
        weights, arguments = data["model"], data["run_invariants"]["args"]
        step = int(data["state"]["iter"])
        config = config_from_arguments(arguments)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of the training code: it lacks {error}; is it of format moeut?"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    counters = sum(bool(COUNTER.fullmatch(name)) for name in weights)
    left = sorted(set(data) - {"model", "run_invariants", "state"})
    notes = [f"left out: {', '.join(left)}"] if left else []
    notes += [f"left out: {counters} usage counters"] if counters else []
    return Original(
        origin="moeut-training",
        path=path,
        weights=_tensors(weights, path),
        config=config,
        context=int(arguments.get("lm.unroll", CONTEXT)),
        step=step,
        recipe=recipe_from_arguments(arguments),
        notes=notes,
    )


def _read_clean(path: Path, config_path: Path | None) -> Original:
    weights: Any
    found: Any = None
    if path.suffix == ".safetensors":
        weights, found = _read_safetensors(path)
    else:
        data = load_safely(path)
        weights = data
        if isinstance(data, Mapping) and "embedding.weight" not in data:
            weights = next((data[key] for key in WEIGHT_KEYS if isinstance(data.get(key), Mapping)), data)
            found = next((data[key] for key in CONFIG_KEYS if isinstance(data.get(key), Mapping)), None)
    if config_path is None and found is None:
        config_path = next(
            (p for p in (path.with_suffix(".json"), path.parent / "config.json") if p.is_file()), None
        )
    config = _read_config(config_path) if config_path is not None else found
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{path} says nothing of its configuration; "
            "name a JSON or YAML file with the arguments of MoEUTLM in --config"
        )
    context = config.get("context_length", CONTEXT)
    return Original("moeut", path, _tensors(weights, path), dict(config), context=context)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as archive:
            names = archive.keys()
            weights = {name: archive.get_tensor(name) for name in names}
            config = (archive.metadata() or {}).get("config")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return weights, json.loads(config) if config else None


def _read_config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _tensors(weights: Any, path: Path) -> dict[str, Tensor]:
    """A state dict, without the prefix that data parallelism adds."""
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
