"""The command line of the training code, as its checkpoints keep it: a flat map of dotted names.

Values are those that were typed, before parsing: numbers may be text, flags are 0 or 1, `none` stands for
nothing. Architectures that were in none of the published runs and that no spec can describe are refused by
name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DEFAULTS: Mapping[str, Any] = {
    "transformer.variant": "preln_moe_universal",
    "transformer.activation": "relu",
    "transformer.ff_multiplier": 4.0,
    "transformer.head_projection_size": None,
    "transformer.embedding_scale": None,
    "transformer.universal.group_size": 1,
    "transformer.universal.group_type": "abab",
    "transformer.act_loss": 0.0,
    "lm.trafo.context_blocks": 1,
    "lm.trafo.norm_input": False,
    "lm.trafo.force_out_norm": False,
    "lm.unroll": 100,
    "embedding_size": None,
    "rope.rotate_fraction": 0.5,
    "rope.base": 10000.0,
    "pkm.n_heads": 1,
    "moe.n_experts": 128,
    "moe.expert_size": 128,
    "moe.selection_mode": "sigmoid",
    "moe.activation_after_topk": False,
    "moe.perplexity_reg": 0.0,
    "moe.bias": False,
    "moe.sel_bias": False,
    "moe.drop_expert": 0.0,
    "moe.nonorm": False,
    "moe.att.enable": False,
    "moe.att.n_experts": 4,
    "moe.att.expert_size": 256,
    "moe.att.k": 2,
    "moe.att.q_expert": True,
    "moe.att.k_expert": True,
    "moe.att.v_expert": True,
    "moe.att.o_expert": True,
    "moe.att.v_size": None,
    "moe.att.same_sel": False,
    "moe.att.selection_mode": "sigmoid",
    "moe.att.perplexity_reg": None,
    "moe.att.drop_expert": None,
    "moa.cvloss": 0.0,
    "moa.switchloss": 0.0,
    "moa.miloss": 0.0,
    "sut.sample_topk": 0,
    "sut.max_relative_positions": 64,
    "batch_size": 128,
    "lr": 1e-3,
    "min_lr_multiplier": 0.0,
    "wd": 0.0,
    "lr_warmup": 0,
    "lr_sched.type": "step",
    "n_microbatch": None,
    "grad_clip": 1.0,
    "stop_after": None,
    "task": "c4_transformer",
}
"""What the training code takes where the command line was silent."""

DENSE = ("preln_rope", "rope", "preln_rope_universal", "rope_universal")
MOE = ("preln_moe", "moe", "preln_moe_universal", "moe_universal")
SUT = ("sut_universal", "actsut_universal", "preln_sut_universal", "preln_actsut_universal")

RECIPES = {
    "c4_transformer": "paper",
    "pes2o_transformer": "paper_pes2o",
    "slimpajama_transformer": "paper_slimpajama",
    "thestack_transformer": "paper_thestack",
}


class Arguments:
    """Typed access with the defaults of the training code."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._values = {**DEFAULTS, **given}

    def __getitem__(self, name: str) -> Any:
        """The value as its default's type has it. Raises ValueError for a name that must be given and is not."""
        if name not in self._values:
            raise ValueError(f"the arguments of the checkpoint lack {name!r}")
        return _parsed(self._values[name])

    def flag(self, name: str) -> bool:
        return bool(self[name])

    def require(self, name: str, *allowed: Any) -> None:
        """Raises ValueError unless the value is one that a spec can describe."""
        if self[name] not in allowed:
            choices = " or ".join(str(value) for value in allowed)
            raise ValueError(f"{name}={self[name]} has no counterpart here; this reads {choices}")


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def config_from_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, in the words of `spec_from_config`, of a run of the training code.

    Raises ValueError naming the argument that no spec can describe.
    """
    arguments = Arguments(given)
    variant = arguments["transformer.variant"]
    if variant not in (*DENSE, *MOE, *SUT):
        raise ValueError(
            f"transformer.variant={variant} has no counterpart here; this reads {', '.join(DENSE + MOE + SUT)}"
        )
    arguments.require("transformer.activation", "relu")
    arguments.require("lm.trafo.context_blocks", 0)
    arguments.require("embedding_size", None)
    config = _skeleton(arguments, variant)
    if variant in DENSE:
        return config | _dense(arguments)
    return config | (_moe(arguments) if variant in MOE else _sut(arguments, variant))


def _skeleton(arguments: Arguments, variant: str) -> dict[str, Any]:
    d_model, depth = arguments["state_size"], arguments["transformer.encoder_n_layers"]
    is_pre, is_shared = "preln" in variant, "universal" in variant
    scale = arguments["transformer.embedding_scale"]
    root = math.sqrt(d_model)
    if scale is not None and scale != 1 and not math.isclose(scale, root, rel_tol=1e-6):
        raise ValueError(
            f"transformer.embedding_scale={scale} has no counterpart here; this reads 1 or {root}"
        )
    return {
        "d_model": d_model,
        "n_layers": depth,
        "group_size": arguments["transformer.universal.group_size"] if is_shared else depth,
        "group_pattern": arguments["transformer.universal.group_type"],
        "norm": ("peri" if variant in MOE and arguments.flag("moe.nonorm") else "pre") if is_pre else "post",
        "norm_input": arguments.flag("lm.trafo.norm_input"),
        "final_norm": is_pre or arguments.flag("lm.trafo.force_out_norm"),
        "scaled_embedding": not is_pre if scale is None else scale != 1,
        "rotate_fraction": float(arguments["rope.rotate_fraction"]),
        "rope_base": float(arguments["rope.base"]),
    }


def _heads(arguments: Arguments) -> dict[str, Any]:
    return {
        "n_heads": arguments["transformer.n_heads"],
        "d_head": arguments["transformer.head_projection_size"],
    }


def _dense(arguments: Arguments) -> dict[str, Any]:
    width = int(arguments["state_size"] * arguments["transformer.ff_multiplier"])
    return {**_heads(arguments), "d_ff": width}


def _moe(arguments: Arguments) -> dict[str, Any]:
    for name in ("moe.selection_mode", "moe.att.selection_mode"):
        arguments.require(name, "sigmoid")
    for name in ("moe.att.enable", "moe.att.v_expert", "moe.att.o_expert"):
        arguments.require(name, True)
    for name in ("moe.bias", "moe.sel_bias", "moe.activation_after_topk", "moe.att.same_sel"):
        arguments.require(name, False)
    for name in ("moe.att.q_expert", "moe.att.k_expert"):
        arguments.require(name, False)
    arguments.require("moe.att.v_size", None, arguments["transformer.head_projection_size"])
    if arguments.flag("moe.nonorm") and "preln" not in arguments["transformer.variant"]:
        raise ValueError("moe.nonorm=1 without preln has no norms at all and no counterpart here")
    weight, dropout = arguments["moe.perplexity_reg"], arguments["moe.drop_expert"]
    own_weight, own_dropout = arguments["moe.att.perplexity_reg"], arguments["moe.att.drop_expert"]
    return {
        **_heads(arguments),
        "ff_n_experts": arguments["moe.n_experts"],
        "ff_expert_size": arguments["moe.expert_size"],
        "ff_k": arguments["pkm.n_heads"],
        "ff_expert_dropout": float(dropout),
        "att_n_experts": arguments["moe.att.n_experts"],
        "att_k": arguments["moe.att.k"],
        "att_expert_dropout": float(dropout if own_dropout is None else own_dropout),
        "entropy_reg": float(weight),
        "att_entropy_reg": float(weight if own_weight is None else own_weight),
    }


def _sut(arguments: Arguments, variant: str) -> dict[str, Any]:
    return {
        "d_head": arguments["transformer.head_projection_size"],
        "ff_n_experts": arguments["moe.n_experts"],
        "ff_expert_size": arguments["moe.expert_size"],
        "ff_k": arguments["pkm.n_heads"],
        "att_n_experts": arguments["moe.att.n_experts"],
        "att_expert_size": arguments["moe.att.expert_size"],
        "att_k": arguments["moe.att.k"],
        "sample_topk": arguments["sut.sample_topk"],
        "max_relative_positions": arguments["sut.max_relative_positions"],
        "mi_loss": float(arguments["moa.miloss"]),
        "switch_loss": float(arguments["moa.switchloss"]),
        "cv_loss": float(arguments["moa.cvloss"]),
        "halting": "act" if "act" in variant else None,
        "act_loss": float(arguments["transformer.act_loss"]),
    }


def recipe_from_arguments(given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The published recipe of the data set, and the overrides that make it the recipe of this run."""
    arguments = Arguments(given)
    warmup = arguments["lr_warmup"]
    schedule = f"{{kind: constant, warmup_steps: {warmup}}}"
    if arguments["lr_sched.type"] == "cos":
        floor = arguments["min_lr_multiplier"]
        schedule = f"{{kind: cosine, warmup_steps: {warmup}, min_lr_multiplier: {floor}}}"
    overrides = [
        f"batch.size={arguments['batch_size']}",
        f"context={arguments['lm.unroll']}",
        f"optimizer.lr={arguments['lr']}",
        f"optimizer.weight_decay={arguments['wd']}",
        f"clip_norm={'null' if not arguments['grad_clip'] else arguments['grad_clip']}",
        f"schedule={schedule}",
    ]
    if arguments["n_microbatch"]:
        overrides.append(f"batch.micro={-(-arguments['batch_size'] // arguments['n_microbatch'])}")
    if arguments["stop_after"]:
        overrides.append(f"steps={arguments['stop_after']}")
    return RECIPES.get(arguments["task"], "paper"), overrides
