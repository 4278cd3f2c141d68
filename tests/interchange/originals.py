"""Files as the original code writes them, with the weights of the golden cases in them."""

import collections
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import moeut_compose as mc

GOLDEN = Path(__file__).parents[1] / "golden"
CLEAN = [
    "moeut_g1",
    "moeut_g2",
    "moeut_g4_unshared",
    "moeut_ff_k1_big_d_head",
    "moeut_single_attention_expert",
]
TRAINING = {
    "dense_pre_norm": {"transformer.variant": "preln_rope"},
    "dense_post_norm": {"transformer.variant": "rope"},
    "moeut_peri_abab": {"transformer.variant": "preln_moe_universal", "moe.nonorm": 1},
    "moeut_peri_aabb": {
        "transformer.variant": "preln_moe_universal",
        "moe.nonorm": 1,
        "transformer.universal.group_type": "aabb",
    },
    "moeut_pre": {"transformer.variant": "preln_moe_universal"},
    "moeut_post": {"transformer.variant": "moe_universal"},
    "sut_act": {"transformer.variant": "actsut_universal"},
    "sut_no_act": {"transformer.variant": "sut_universal"},
}


class Golden:
    """An archive: weights under the original names, configuration, and what the original computed."""

    def __init__(self, name: str) -> None:
        with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as archive:
            keys = archive.keys()
            tensors = {key: archive.get_tensor(key) for key in keys}
            self.config: dict[str, Any] = json.loads(archive.metadata()["config"])
        self.weights = {key[6:]: value.float() for key, value in tensors.items() if key.startswith("param.")}
        self.ids, self.logits = tensors["tokens"][:, :-1], tensors["eval_logits"]


class DotDict(dict):
    """As the training code has it: what `state` is pickled as."""

    def __getattr__(self, item: str) -> Any:
        return self[item]

    __setattr__ = dict.__setitem__


def arguments(name: str, golden: Golden) -> dict[str, Any]:
    """The command line of a golden case, numbers as the parser of the training code keeps them."""
    config = golden.config
    given = {
        "transformer.variant": "",
        "state_size": config["d_model"],
        "transformer.encoder_n_layers": config["n_layers"],
        "transformer.n_heads": config.get("n_heads", 8),
        "transformer.head_projection_size": str(config["d_head"]),
        "transformer.universal.group_size": config["group_size"],
        "lm.trafo.context_blocks": 0,
        "lm.trafo.norm_input": int(config["norm_input"]),
        "lm.unroll": 16,
        "task": "pes2o_transformer",
        "batch_size": 64,
        "n_microbatch": "2",
        "lr": 0.00025,
        "min_lr_multiplier": 0.1,
        "wd": 0.01,
        "lr_warmup": 4000,
        "lr_sched.type": "cos",
        "grad_clip": "0.25",
        "stop_after": "100000",
        "moe.perplexity_reg": config.get("entropy_reg", 0.0),
        "moe.att.perplexity_reg": str(config.get("att_entropy_reg", "none")),
        "moe.att.enable": 1,
        "moe.att.q_expert": 0,
        "moe.att.k_expert": 0,
        "moa.miloss": config.get("mi_loss", 0.0),
        "transformer.act_loss": config.get("act_loss", 0.0),
        "sut.max_relative_positions": config.get("max_relative_positions", 64),
    }
    if "d_ff" in config:
        given["transformer.ff_multiplier"] = config["d_ff"] / config["d_model"]
    names = {
        "ff_n_experts": "moe.n_experts",
        "ff_expert_size": "moe.expert_size",
        "ff_k": "pkm.n_heads",
        "att_n_experts": "moe.att.n_experts",
        "att_k": "moe.att.k",
        "att_expert_size": "moe.att.expert_size",
    }
    given |= {theirs: config[ours] for ours, theirs in names.items() if ours in config}
    return given | TRAINING[name]


def training_checkpoint(name: str, golden: Golden, path: Path, dictionary: type = dict) -> Path:
    """What the training code's saver writes."""
    counters = {
        f"unique_layers.{layer}.pkm.{counter}": torch.zeros(3)
        for layer in range(golden.config["group_size"])
        for counter in ("iter", "kv_sel_counts_100")
        if "pkm.keys" in " ".join(golden.weights)
    }
    state = dictionary()
    state.update(
        {"iter": 1234, "epoch": 0, "best_losses": {"val": {"iter": 3, "loss": 1.5, "accuracy": 0.5}}}
    )
    parameters = [torch.nn.Parameter(torch.ones(2))]
    content = {
        "state": state,
        "run_invariants": {"args": arguments(name, golden), "wandb_id": {"project": "x", "run_id": "y"}},
        "sampler": {},
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "model": collections.OrderedDict(golden.weights | counters),
        "interface": {},
        "optimizer": torch.optim.AdamW(parameters).state_dict(),
    }
    torch.save(content, path)
    return path


def check_logits(run: Path, golden: Golden) -> None:
    loaded = mc.load_run(run)
    with torch.no_grad():
        logits = loaded.model(golden.ids).logits
    torch.testing.assert_close(logits.double(), golden.logits, rtol=1e-4, atol=1e-4)
