"""From a folder of `transformers` back to a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.interchange.checkpoints import write_run
from moeut_compose.interchange.huggingface.files import CONFIG, PREFIX, STEP, WEIGHTS
from moeut_compose.spec.io import load_recipe
from moeut_compose.spec.model import ModelSpec
from moeut_compose.train import folder as run_folder
from moeut_compose.train.checkpoint import copy_weights
from moeut_compose.train.errors import CheckpointError, RunNotFound

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.spec.recipe import RecipeSpec

INDEX = "model.safetensors.index.json"
"""Says which file holds which weight, where `transformers` has split them."""


@dataclass(frozen=True)
class Exported:
    """An exported folder, read; also one that `save_pretrained` wrote after further training there."""

    folder: Path
    spec: ModelSpec
    recipe: RecipeSpec
    step: int
    """The step of the export: what was trained elsewhere since is not counted."""
    tokenizer: Tokenizer | None
    notes: list[str]

    def model(self) -> LanguageModel:
        """The model with the weights of the folder. Raises `CheckpointError` if they do not fit."""
        weights = read_weights(self.folder)
        model = build_model(self.spec, init=False)
        copy_weights(
            {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}, model, self.folder
        )
        return model


def read_export(folder: Path) -> Exported:
    """Read everything but the weights. Raises `RunNotFound` and `CheckpointError`."""
    if not folder.is_dir():
        raise RunNotFound(f"{folder} is no folder")
    config = read_document(folder / CONFIG)
    if config.get("model_type") != "moeut_compose" or not isinstance(config.get("architecture"), dict):
        raise CheckpointError(f"{folder / CONFIG} describes no model that `moeut-compose export` wrote")
    try:
        spec = ModelSpec.model_validate_json(json.dumps(config["architecture"]))
    except ValidationError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    recipe = folder / run_folder.RECIPE
    tokenizer = folder / run_folder.TOKENIZER
    return Exported(
        folder=folder,
        spec=spec,
        recipe=load_recipe(str(recipe.absolute()) if recipe.is_file() else "default"),
        step=config.get(STEP, 0),
        tokenizer=Tokenizer.load(tokenizer) if tokenizer.is_file() else None,
        notes=[] if recipe.is_file() else [f"{folder} has no {recipe.name}: the run gets the default recipe"],
    )


def import_export(exported: Exported, out: Path, *, tokenizer: Tokenizer | None = None) -> ModelSpec:
    """Write a run folder with the weights of an export, bit for bit, and return its architecture.

    `tokenizer` replaces that of the folder. Raises `CheckpointError` if weights and architecture do not fit,
    `RunError` if `out` is not empty.
    """
    run_folder.check_empty(out)
    write_run(
        out,
        spec=exported.spec,
        recipe=exported.recipe,
        model=exported.model(),
        step=exported.step,
        tokenizer=tokenizer or exported.tokenizer,
        imported={"format": "transformers", "path": str(exported.folder.absolute())},
    )
    return exported.spec


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights by their exported names, from one file or several. Raises `CheckpointError`."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(read_document(folder / INDEX).get("weight_map", {}).values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights |= load_file(folder / Path(name).name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    return weights


def read_document(path: Path) -> dict[str, Any]:
    """A JSON document. Raises `CheckpointError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no document")
    return content
