"""Configurations of the original code as architectures.

The keys are those of `MoEUTLM` of the clean release; `arguments.py` turns the command line of the training
code into the same keys. Where a config is silent, the two repositories differ: the clean release has peri
norm, ABAB sharing and, with one attention expert, an output gate only; the training code says its norm and
sharing and keeps both gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeut_compose.interchange.names import Origin as Origin
from moeut_compose.spec.model import ModelSpec

CLEAN_DEFAULTS: Mapping[str, Any] = {"group_size": 2, "ff_k": 8, "ff_expert_size": 128, "att_k": 2}
"""What `MoEUTLM` takes where a profile is silent."""

ENTROPY_REG = 0.01
ATTENTION_ENTROPY_REG = 0.001


def spec_from_config(
    config: Mapping[str, Any], *, origin: Origin, vocab_size: int, context_length: int, name: str
) -> ModelSpec:
    """The architecture that an original configuration describes.

    Raises ValueError naming the key if the config lacks one that its family needs, `pydantic.ValidationError`
    if its values cannot be combined.
    """
    config = {**CLEAN_DEFAULTS, **config} if origin == "moeut" else config
    try:
        layer = _layer(config, origin)
        group_size, depth = config.get("group_size", config["n_layers"]), config["n_layers"]
    except KeyError as missing:
        raise ValueError(f"the configuration of {name!r} lacks {missing.args[0]!r}") from missing
    if depth % group_size:
        raise ValueError(f"n_layers={depth} is not a multiple of group_size={group_size}")
    placement = config.get("norm", "peri")
    scaled = config.get("scaled_embedding", placement == "post")
    return ModelSpec.model_validate(
        {
            "name": name,
            "vocab_size": vocab_size,
            "context_length": context_length,
            "d_model": config["d_model"],
            "embedding": {
                "scale": "sqrt_d_model" if scaled else 1,
                "norm": "layer_norm" if config.get("norm_input") else "none",
            },
            "norm": {"kind": "layer_norm", "placement": placement},
            "position": _position(config),
            "stages": [
                {
                    "pattern": config.get("group_pattern", "abab").upper(),
                    "repeats": depth // group_size,
                    "layers": [{"count": group_size, **layer}],
                    "halting": _halting(config),
                }
            ],
            "final_norm": config.get("final_norm", placement != "post"),
        }
    )


def _position(config: Mapping[str, Any]) -> dict[str, Any]:
    if "att_expert_size" in config:
        return {"kind": "relative", "max_distance": config.get("max_relative_positions", 64)}
    fraction, base = config.get("rotate_fraction", 0.5), config.get("rope_base", 10000.0)
    return {"kind": "rope", "fraction": fraction, "base": base}


def _halting(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("halting") != "act":
        return {"kind": "none"}
    return {"kind": "act", "weight": config.get("act_loss", 0.01)}


def _layer(config: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    if "att_expert_size" in config:
        return _sut_layer(config)
    if "d_ff" in config:
        return {
            "mixer": {"kind": "attention", "n_heads": config["n_heads"], "d_head": _d_head(config)},
            "feedforward": {"kind": "dense", "d_ff": config["d_ff"]},
        }
    single = config["att_n_experts"] == 1
    return {
        "mixer": {
            "kind": "switch_head",
            "n_heads": config["n_heads"],
            "d_head": _d_head(config),
            "n_experts": config["att_n_experts"],
            "top_k": 1 if single else config["att_k"],
            "gates": "output" if single and origin == "moeut" else "both",
            "expert_dropout": config.get("att_expert_dropout", 0.0),
            "balance": {"kind": "entropy", "weight": config.get("att_entropy_reg", ATTENTION_ENTROPY_REG)},
        },
        "feedforward": {
            "kind": "sigma_moe",
            "n_experts": config["ff_n_experts"],
            "d_expert": config["ff_expert_size"],
            "top_k": config["ff_k"],
            "expert_dropout": config.get("ff_expert_dropout", 0.0),
            "balance": {"kind": "entropy", "weight": config.get("entropy_reg", ENTROPY_REG)},
        },
    }


def _d_head(config: Mapping[str, Any]) -> int:
    return config.get("d_head") or config["d_model"] // config["n_heads"]


def _sut_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    coefficients = {
        "mutual_information_as_coded": config.get("mi_loss", 0.0),
        "switch": config.get("switch_loss", 0.0),
        "cv_squared": config.get("cv_loss", 0.0),
    }
    balance = [{"kind": kind, "weight": weight} for kind, weight in coefficients.items() if weight]
    return {
        "mixer": {
            "kind": "mixture_of_attention",
            "n_experts": config["att_n_experts"],
            "d_expert": config["att_expert_size"],
            "d_head": config["d_head"],
            "top_k": config["att_k"],
            "router": {"kind": "mlp", "n_sampled": config.get("sample_topk", 0)},
            "balance": balance,
        },
        "feedforward": {
            "kind": "moe",
            "n_experts": config["ff_n_experts"],
            "d_expert": config["ff_expert_size"],
            "top_k": config["ff_k"],
            "bias": True,
            "init": "uniform_fan_in",
            "router": {"kind": "mlp"},
            "balance": balance,
        },
    }
