"""Parameter names and layouts of the original code, and ours.

Two repositories published the systems: the clean release (`moeut`, names below `transformer.layers`) and the training
code of the paper (`moeut-training`, names below `unique_layers`). A rule maps one original tensor to one or more of
ours; `to_ours` and `to_original` are inverse to each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Original name (a pattern) to our names (templates), with the change of layout in both directions."""

    pattern: str
    ours: tuple[str, ...]
    split: Callable[[Tensor, int], tuple[Tensor, ...]] = lambda tensor, n_heads: (tensor,)
    join: Callable[[tuple[Tensor, ...], int], Tensor] = lambda tensors, n_heads: tensors[0]


def _halves(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    first, second = tensor.chunk(2, dim=0)
    return first, second


def _stacked(tensors: tuple[Tensor, ...], n_heads: int) -> Tensor:
    return torch.cat(tensors, dim=0)


def _value_heads(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    """A dense `[H * d_head, D]` value matrix as `[H, D, d_head]`; expert tensors stay as they are."""
    return (tensor if tensor.dim() == 3 else tensor.unflatten(0, (n_heads, -1)).transpose(1, 2).contiguous(),)


def _output_heads(tensor: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    """A dense `[D, H * d_head]` output matrix as `[H, d_head, D]`; expert tensors stay as they are."""
    return (tensor if tensor.dim() == 3 else tensor.t().unflatten(0, (n_heads, -1)).contiguous(),)


_LAYER = r"(?:transformer\.layers|unique_layers)\.(\d+)\."
_SUT = r"unique_layers\.(\d+)\.(?:mod\.)?"
_OURS = "stages.0.layers.{0}."

RULES = (
    Rule(r"embedding\.weight", ("embedding.weight",)),
    Rule(r"(?:lm_head|output)\.(weight|bias)", ("head.{0}",)),
    Rule(r"out_norm\.(weight|bias)", ("final_norm.{0}",)),
    Rule(_LAYER + r"(?:ln1|norm1|self_attn\.norm)\.(weight|bias)", (_OURS + "mixer_norm.{1}",)),
    Rule(_LAYER + r"(?:ln2|norm2|pkm\.norm)\.(weight|bias)", (_OURS + "feedforward_norm.{1}",)),
    Rule(_LAYER + r"self_attn\.data_to_q\.weight", (_OURS + "mixer.query.weight",)),
    Rule(
        _LAYER + r"self_attn\.data_to_kv\.weight",
        (_OURS + "mixer.key.weight", _OURS + "mixer.value.weight"),
        _halves,
        _stacked,
    ),
    Rule(_LAYER + r"self_attn\.out_proj\.weight", (_OURS + "mixer.output.weight",)),
    Rule(_LAYER + r"linear1\.(weight|bias)", (_OURS + "feedforward.up.{1}",)),
    Rule(_LAYER + r"linear2\.(weight|bias)", (_OURS + "feedforward.down.{1}",)),
    Rule(_LAYER + r"(?:attention\.q\.weight|self_attn\.projections\.q)", (_OURS + "mixer.query.weight",)),
    Rule(_LAYER + r"(?:attention\.k\.weight|self_attn\.projections\.k)", (_OURS + "mixer.key.weight",)),
    Rule(_LAYER + r"(?:attention|self_attn\.projections)\.v", (_OURS + "mixer.value",), _value_heads),
    Rule(_LAYER + r"(?:attention|self_attn\.projections)\.o", (_OURS + "mixer.output",), _output_heads),
    Rule(_LAYER + r"(?:attention\.sel_v|self_attn\.selections\.v)", (_OURS + "mixer.value_router.weight",)),
    Rule(_LAYER + r"(?:attention\.sel_o|self_attn\.selections\.o)", (_OURS + "mixer.output_router.weight",)),
    Rule(_LAYER + r"(?:ffn|pkm)\.keys", (_OURS + "feedforward.up",)),
    Rule(_LAYER + r"(?:ffn|pkm)\.values", (_OURS + "feedforward.down",)),
    Rule(_LAYER + r"(?:ffn|pkm)\.expert_sel", (_OURS + "feedforward.router.weight",)),
    Rule(_SUT + r"self_attn_layer_norm\.(weight|bias)", (_OURS + "mixer_norm.{1}",)),
    Rule(_SUT + r"final_layer_norm\.(weight|bias)", (_OURS + "feedforward_norm.{1}",)),
    Rule(_SUT + r"self_attn\.q_proj\.experts\.w", (_OURS + "mixer.query",)),
    Rule(_SUT + r"self_attn\.q_proj\.output_experts\.w", (_OURS + "mixer.output",)),
    Rule(_SUT + r"self_attn\.q_proj\.w_gate\.0\.(weight|bias)", (_OURS + "mixer.router.inner.{1}",)),
    Rule(_SUT + r"self_attn\.q_proj\.w_gate\.3\.weight", (_OURS + "mixer.router.weight",)),
    Rule(_SUT + r"self_attn\.k_proj\.weight", (_OURS + "mixer.key.weight",)),
    Rule(_SUT + r"self_attn\.v_proj\.weight", (_OURS + "mixer.value.weight",)),
    Rule(_SUT + r"self_attn\.rel_pos_emb", (_OURS + "mixer.position.table",)),
    Rule(_SUT + r"moe\.experts\.w", (_OURS + "feedforward.up",)),
    Rule(_SUT + r"moe\.experts\.b", (_OURS + "feedforward.up_bias",)),
    Rule(_SUT + r"moe\.output_experts\.w", (_OURS + "feedforward.down",)),
    Rule(_SUT + r"moe\.output_experts\.b", (_OURS + "feedforward.down_bias",)),
    Rule(_SUT + r"moe\.w_gate\.0\.(weight|bias)", (_OURS + "feedforward.router.inner.{1}",)),
    Rule(_SUT + r"moe\.w_gate\.3\.weight", (_OURS + "feedforward.router.weight",)),
    Rule(_SUT + r"_gate\.0\.(weight|bias)", ("stages.0.halting.inner.{1}",)),
    Rule(_SUT + r"_gate\.3\.weight", ("stages.0.halting.outer.weight",)),
)


def find_rule(name: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule for an original parameter name and our names for it. Raises ValueError for a name nobody published."""
    for rule in RULES:
        found = re.fullmatch(rule.pattern, name)
        if found:
            return rule, tuple(template.format(*found.groups()) for template in rule.ours)
    raise ValueError(f"unknown parameter name {name!r}: neither of the original repositories has it")


def to_ours(original: Mapping[str, Tensor], *, n_heads: int) -> dict[str, Tensor]:
    """Original parameters (or their gradients) under our names and in our layout."""
    ours: dict[str, Tensor] = {}
    for name, tensor in original.items():
        rule, names = find_rule(name)
        ours |= dict(zip(names, rule.split(tensor, n_heads), strict=True))
    return ours
