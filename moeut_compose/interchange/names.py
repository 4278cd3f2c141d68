"""Parameter names and layouts of the original code, and ours.

Two repositories published the systems: the clean release (`moeut`) and the training code of the paper
(`moeut-training`), which names its parts differently for dense, MoEUT and SUT models and for each norm
placement. A rule maps one original tensor to one or more of ours; `to_ours` and `to_original` are inverse to
each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeut_compose.spec.mixers import AttentionSpec, SwitchHeadSpec
from moeut_compose.spec.model import ModelSpec

Origin = Literal["moeut", "moeut-training"]

_GROUPS = {"{layer}": r"(?P<layer>\d+)", "{part}": r"(?P<part>weight|bias)"}


@dataclass(frozen=True)
class Rule:
    """Original name and our names as templates in `{layer}` and `{part}`, with the change of layout."""

    original: str
    ours: tuple[str, ...]
    split: Callable[[Tensor, int], tuple[Tensor, ...]] = lambda tensor, n_heads: (tensor,)
    join: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]


def _halves(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    first, second = tensor.chunk(2, dim=0)
    return first, second


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(tuple(tensors), dim=0)


def _value_heads(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    """A dense `[H * d_head, D]` value matrix as `[H, D, d_head]`; expert tensors stay as they are."""
    return (tensor if tensor.dim() == 3 else tensor.unflatten(0, (n_heads, -1)).transpose(1, 2).contiguous(),)


def _value_matrix(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2).flatten(0, 1).contiguous()


def _output_heads(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    """A dense `[D, H * d_head]` output matrix as `[H, d_head, D]`; expert tensors stay as they are."""
    return (tensor if tensor.dim() == 3 else tensor.t().unflatten(0, (n_heads, -1)).contiguous(),)


def _output_matrix(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].flatten(0, 1).t().contiguous()


def _rules(original_prefix: str, ours_prefix: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules that rename only."""
    return tuple(Rule(original_prefix + original, (ours_prefix + ours,)) for original, ours in names.items())


_OURS = "stages.0.layers.{layer}."
_EMBEDDING = Rule("embedding.weight", ("embedding.weight",))
_FINAL_NORM = Rule("out_norm.{part}", ("final_norm.{part}",))

_CLEAN_LAYER = "transformer.layers.{layer}."
_CLEAN = (
    _EMBEDDING,
    _FINAL_NORM,
    Rule("lm_head.{part}", ("head.{part}",)),
    *_rules(
        _CLEAN_LAYER,
        _OURS,
        {
            "ln1.{part}": "mixer_norm.{part}",
            "ln2.{part}": "feedforward_norm.{part}",
            "attention.q.weight": "mixer.query.weight",
            "attention.k.weight": "mixer.key.weight",
            "attention.sel_v": "mixer.value_router.weight",
            "attention.sel_o": "mixer.output_router.weight",
            "ffn.keys": "feedforward.up",
            "ffn.values": "feedforward.down",
            "ffn.expert_sel": "feedforward.router.weight",
        },
    ),
)
_CLEAN_EXPERTS = _rules(_CLEAN_LAYER, _OURS, {"attention.v": "mixer.value", "attention.o": "mixer.output"})
_CLEAN_SINGLE = (
    Rule(_CLEAN_LAYER + "attention.v", (_OURS + "mixer.value",), _value_heads, _value_matrix),
    Rule(_CLEAN_LAYER + "attention.o", (_OURS + "mixer.output",), _output_heads, _output_matrix),
)

_LAYER = "unique_layers.{layer}."
_TRAINING = (_EMBEDDING, _FINAL_NORM, Rule("output.{part}", ("head.{part}",)))
_NORMS = _rules(
    _LAYER, _OURS, {"norm1.{part}": "mixer_norm.{part}", "norm2.{part}": "feedforward_norm.{part}"}
)
_PERI_NORMS = _rules(
    _LAYER,
    _OURS,
    {"self_attn.norm.{part}": "mixer_norm.{part}", "pkm.norm.{part}": "feedforward_norm.{part}"},
)
_DENSE = (
    *_rules(
        _LAYER,
        _OURS,
        {
            "self_attn.data_to_q.weight": "mixer.query.weight",
            "self_attn.out_proj.weight": "mixer.output.weight",
            "linear1.{part}": "feedforward.up.{part}",
            "linear2.{part}": "feedforward.down.{part}",
        },
    ),
    Rule(
        _LAYER + "self_attn.data_to_kv.weight",
        (_OURS + "mixer.key.weight", _OURS + "mixer.value.weight"),
        _halves,
        _stacked,
    ),
)
_MOE = _rules(
    _LAYER,
    _OURS,
    {
        "self_attn.projections.q": "mixer.query.weight",
        "self_attn.projections.k": "mixer.key.weight",
        "self_attn.projections.v": "mixer.value",
        "self_attn.projections.o": "mixer.output",
        "self_attn.selections.v": "mixer.value_router.weight",
        "self_attn.selections.o": "mixer.output_router.weight",
        "pkm.keys": "feedforward.up",
        "pkm.values": "feedforward.down",
        "pkm.expert_sel": "feedforward.router.weight",
    },
)
_SUT_NAMES = {
    "self_attn_layer_norm.{part}": "mixer_norm.{part}",
    "final_layer_norm.{part}": "feedforward_norm.{part}",
    "self_attn.q_proj.experts.w": "mixer.query",
    "self_attn.q_proj.output_experts.w": "mixer.output",
    "self_attn.q_proj.w_gate.0.{part}": "mixer.router.inner.{part}",
    "self_attn.q_proj.w_gate.3.weight": "mixer.router.weight",
    "self_attn.k_proj.weight": "mixer.key.weight",
    "self_attn.v_proj.weight": "mixer.value.weight",
    "self_attn.rel_pos_emb": "mixer.position.table",
    "moe.experts.w": "feedforward.up",
    "moe.experts.b": "feedforward.up_bias",
    "moe.output_experts.w": "feedforward.down",
    "moe.output_experts.b": "feedforward.down_bias",
    "moe.w_gate.0.{part}": "feedforward.router.inner.{part}",
    "moe.w_gate.3.weight": "feedforward.router.weight",
}
_SUT = _rules(_LAYER, _OURS, _SUT_NAMES)
_SUT_WITH_ACT = (
    *_rules(_LAYER + "mod.", _OURS, _SUT_NAMES),
    Rule(_LAYER + "_gate.0.{part}", ("stages.0.halting.inner.{part}",)),
    Rule(_LAYER + "_gate.3.weight", ("stages.0.halting.outer.weight",)),
)

_EVERY = (*_CLEAN, *_CLEAN_SINGLE, *_TRAINING, *_NORMS, *_PERI_NORMS, *_DENSE, *_MOE, *_SUT, *_SUT_WITH_ACT)

COUNTER = re.compile(r"unique_layers\.\d+\.pkm\.(?:iter|kv_sel_counts_100)")
"""Usage counters that the training code saves among the weights; they are dropped."""


def _groups(template: str) -> str:
    """A template as a regular expression."""
    pattern = re.escape(template)
    for placeholder, group in _GROUPS.items():
        pattern = pattern.replace(re.escape(placeholder), group)
    return pattern


def find_rule(name: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule for an original parameter name and our names for it. Raises ValueError for an unknown one."""
    for rule in _EVERY:
        found = re.fullmatch(_groups(rule.original), name)
        if found:
            return rule, tuple(template.format(**found.groupdict()) for template in rule.ours)
    raise ValueError(f"unknown parameter name {name!r}: neither of the original repositories has it")


def to_ours(original: Mapping[str, Tensor], *, n_heads: int) -> dict[str, Tensor]:
    """Original parameters (or their gradients) under our names and in our layout; counters are dropped."""
    ours: dict[str, Tensor] = {}
    for name, tensor in original.items():
        if COUNTER.fullmatch(name):
            continue
        rule, names = find_rule(name)
        ours |= dict(zip(names, rule.split(tensor, n_heads), strict=True))
    return ours


def to_original(ours: Mapping[str, Tensor], spec: ModelSpec, *, origin: Origin) -> dict[str, Tensor]:
    """Our parameters under the names and in the layout of the original code, for a model that it can hold.

    Raises ValueError naming a parameter that the original code has no place for.
    """
    original: dict[str, Tensor] = {}
    left = dict(ours)
    for rule in rules_for(spec, origin):
        pattern = _groups(rule.ours[0])
        for name in ours:
            found = re.fullmatch(pattern, name)
            if found:
                groups = {"layer": "0", **found.groupdict()}
                parts = [left.pop(template.format(**groups)) for template in rule.ours]
                original[rule.original.format(**groups)] = rule.join(parts)
    if left:
        raise ValueError(f"the original code ({origin}) has no place for {sorted(left)[0]}")
    return original


def rules_for(spec: ModelSpec, origin: Origin) -> tuple[Rule, ...]:
    """The rules of one system: each of our names occurs once."""
    mixer = spec.stages[0].layers[0].mixer
    if isinstance(mixer, AttentionSpec):
        return (*_TRAINING, *_NORMS, *_DENSE)
    if not isinstance(mixer, SwitchHeadSpec):
        return (*_TRAINING, *(_SUT if spec.stages[0].halting.kind == "none" else _SUT_WITH_ACT))
    if origin == "moeut":
        return (*_CLEAN, *(_CLEAN_SINGLE if mixer.gates == "output" else _CLEAN_EXPERTS))
    return (*_TRAINING, *(_PERI_NORMS if spec.norm.placement == "peri" else _NORMS), *_MOE)
