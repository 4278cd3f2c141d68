"""What an exported folder holds, file by file."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.interchange.huggingface.bundle import modeling_source
from moeut_compose.interchange.huggingface.card import model_card
from moeut_compose.interchange.huggingface.source import HERE, read
from moeut_compose.spec.dump import dump_yaml
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import folder as run_folder
from moeut_compose.train.checkpoint import weights_of

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.run import Run

PREFIX = "model."
"""What exported weights are called besides: the model is one part of the class that `transformers` loads."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
STEP = "moeut_compose_step"
"""Key of the configuration for the training step of the weights."""


def write_files(run: Run, folder: Path) -> Tokenizer | None:
    """Write everything that `transformers` needs of a run, and return its tokenizer, if it has one."""
    has_tokenizer = (run.path / run_folder.TOKENIZER).is_file()
    tokenizer = run.tokenizer if has_tokenizer else None
    code = {"configuration": read(f"{HERE}.configuration").text, "modeling": modeling_source()}
    if tokenizer is not None:
        code["tokenization"] = read(f"{HERE}.tokenization").text
        tokenizer.save(folder / run_folder.TOKENIZER)
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, run.context))
    for name, text in code.items():
        (folder / f"{name}_moeut_compose.py").write_text(text, encoding="utf-8")
    write_json(folder / CONFIG, config(run.spec, run.step))
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    recipe = without_folders(run.recipe)
    (folder / run_folder.RECIPE).write_text(dump_yaml(recipe), encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, recipe), encoding="utf-8")
    save_file(exported_weights(run.model), folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # the library makes a file that only its owner reads
    return tokenizer


def exported_weights(model: LanguageModel) -> dict[str, Tensor]:
    """All weights under their exported names."""
    return {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in weights_of(model).items()}


def config(spec: ModelSpec, step: int) -> dict[str, Any]:
    """`config.json`: the architecture, and its sizes by the names that `transformers` knows."""
    return {
        "architectures": ["MoeutComposeForCausalLM"],
        "model_type": "moeut_compose",
        "auto_map": {
            "AutoConfig": "configuration_moeut_compose.MoeutComposeConfig",
            "AutoModelForCausalLM": "modeling_moeut_compose.MoeutComposeForCausalLM",
        },
        "architecture": spec.model_dump(mode="json"),
        "dtype": "float32",
        "hidden_size": spec.d_model,
        "max_position_embeddings": spec.context_length,
        "num_hidden_layers": spec.depth,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
        STEP: step,
        "transformers_version": version("transformers"),
    }


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """`tokenizer_config.json`. Where no piece is meant for padding, `</s>` or the unknown piece fills batches up."""
    pieces = tokenizer.control_pieces()
    return {
        "tokenizer_class": "MoeutComposeTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moeut_compose.MoeutComposeTokenizer", None]},
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": piece for name, (piece, _) in pieces.items()},
        "pad_token": filler(tokenizer)[0],
    }


def filler(tokenizer: Tokenizer) -> tuple[str, int]:
    """The piece that fills batches up, and its id."""
    pieces = tokenizer.control_pieces()
    return pieces.get("pad") or pieces.get("eos") or pieces["unk"]


def generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`generation_config.json`. Training text holds no `</s>`, so it ends nothing."""
    padding = {} if tokenizer is None else {"pad_token_id": filler(tokenizer)[1]}
    return {"_from_model_config": False, **padding, "transformers_version": version("transformers")}


def without_folders(recipe: RecipeSpec) -> RecipeSpec:
    """The recipe with files by their last names: where they lay on one machine means nothing on another."""

    def shortened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shortened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shortened(item) for item in value]
        return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value

    return RecipeSpec.model_validate_json(json.dumps(shortened(recipe.model_dump(mode="json"))))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a document that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
