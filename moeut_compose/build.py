"""From spec to module: only this file, `build_routers` and `build_passes` know both sides.

Each `build_*` is one `match` over a closed union; the type checker proves that no variant is missing.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn

from moeut_compose.blocks.feedforwards import DenseFeedForward, ExpertFeedForward
from moeut_compose.blocks.layers import Layer, PeriNormLayer, PostNormLayer, PreNormLayer
from moeut_compose.blocks.linear import Lora
from moeut_compose.blocks.mixers import Attention, MixtureOfAttention, SwitchHead
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.norms import LayerNorm, Norm, RMSNorm, Unscaled
from moeut_compose.blocks.positions import NoPosition, Relative, Rope
from moeut_compose.blocks.roles import FeedForward, Mixer, Position
from moeut_compose.blocks.routers import SigmoidRouter
from moeut_compose.blocks.stages import Stage
from moeut_compose.build_passes import build_halting, build_injection, build_step
from moeut_compose.build_routers import build_balance, build_router
from moeut_compose.spec.feedforwards import DenseSpec, FeedForwardSpec, MoESpec, SigmaMoESpec
from moeut_compose.spec.mixers import AttentionSpec, MixerSpec, MixtureOfAttentionSpec, SwitchHeadSpec
from moeut_compose.spec.model import Member, ModelSpec
from moeut_compose.spec.norms import LayerNormSpec, NormSpec, RMSNormSpec
from moeut_compose.spec.positions import NoPositionSpec, PositionSpec, RelativeSpec, RopeSpec
from moeut_compose.spec.stages import stage_schedule


def build_model(
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    init: bool = True,
) -> LanguageModel:
    """Build `spec` with fresh weights that depend on `seed` alone, not on the device.

    On the device `meta` nothing is allocated: shapes can be read and passes traced. `init=False` leaves the
    weights as the memory was, for callers that load all of them; tables that are no weights are filled all
    the same.
    """
    with torch.device("meta"):
        model = _assemble(spec)
    if torch.device(device).type == "meta":
        return model.to(dtype)
    if not init:
        model = model.to_empty(device=device).to(dtype=dtype)
        for module in model.modules():
            if isinstance(module, Position):
                module.fill_tables()
        return model
    model = model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_parameters(layer_scales=_layer_scales(spec))
    return model.to(device=device, dtype=dtype)


def _assemble(spec: ModelSpec) -> LanguageModel:
    members = list(spec.members())
    stages = [
        Stage(
            [build_layer(member, spec) for member in members if member.stage == index],
            schedule=stage_schedule(stage.n_members, stage.repeats, stage.pattern),
            halting=build_halting(stage.halting, spec.d_model),
            injection=build_injection(stage.inject, spec.d_model),
            step=build_step(stage.step, spec.d_model, n_repeats=stage.repeats),
        )
        for index, stage in enumerate(spec.stages)
    ]
    return LanguageModel(
        vocab_size=spec.vocab_size,
        d_model=spec.d_model,
        stages=stages,
        embedding_scale=math.sqrt(spec.d_model) if spec.embedding.scale == "sqrt_d_model" else 1.0,
        embedding_norm=Unscaled(spec.d_model) if spec.embedding.norm == "layer_norm" else nn.Identity(),
        final_norm=build_norm(spec.norm, spec.d_model) if spec.final_norm else nn.Identity(),
        head=None if spec.head.tied else nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head.bias),
        tied_bias=spec.head.bias,
    )


def _layer_scales(spec: ModelSpec) -> list[list[float]]:
    """The factor c of each member: 1 for post norm, else sqrt(2 / depth), where depth counts applications."""
    scales: list[list[float]] = [[] for _ in spec.stages]
    for member in spec.members():
        scales[member.stage].append(1.0 if member.norm.placement == "post" else math.sqrt(2.0 / spec.depth))
    return scales


def build_layer(member: Member, spec: ModelSpec) -> Layer:
    lora = None if member.lora is None else Lora(member.lora.rank, member.applications)
    mixer = build_mixer(member.layer.mixer, spec, member.position, lora)
    feedforward = build_feedforward(member.layer.feedforward, spec.d_model, lora)
    n_repeats = member.applications if member.has_own_norms else None
    norms = [build_norm(member.norm, spec.d_model, n_repeats=n_repeats) for _ in range(2)]
    match member.norm.placement:
        case "pre":
            return PreNormLayer(mixer, feedforward, *norms)
        case "post":
            return PostNormLayer(mixer, feedforward, *norms)
        case "peri":
            return PeriNormLayer(mixer, feedforward, *norms)
        case _:
            assert_never(member.norm.placement)


def build_mixer(spec: MixerSpec, model: ModelSpec, position_spec: PositionSpec, lora: Lora | None) -> Mixer:
    d_model = model.d_model
    position = build_position(
        position_spec, n_heads=spec.n_heads, d_head=spec.d_head, n_positions=model.context_length
    )
    match spec:
        case AttentionSpec():
            return Attention(d_model, n_heads=spec.n_heads, d_head=spec.d_head, position=position, lora=lora)
        case SwitchHeadSpec():

            def router() -> SigmoidRouter:
                return SigmoidRouter(
                    d_model,
                    n_experts=spec.n_experts,
                    top_k=spec.top_k,
                    n_heads=spec.n_heads,
                    attention=True,
                    expert_dropout=spec.expert_dropout,
                    balance=build_balance(spec.balance, top_k=spec.top_k),
                )

            return SwitchHead(
                d_model,
                n_heads=spec.n_heads,
                d_head=spec.d_head,
                value_router=router() if spec.gates == "both" else None,
                output_router=router(),
                position=position,
                lora=lora,
            )
        case MixtureOfAttentionSpec():
            router_module = build_router(
                spec.router, d_model, n_experts=spec.n_experts, top_k=spec.top_k, balance=spec.balance
            )
            return MixtureOfAttention(
                d_model,
                d_expert=spec.d_expert,
                d_head=spec.d_head,
                router=router_module,
                position=position,
                lora=lora,
            )
        case _:
            assert_never(spec)


def build_feedforward(spec: FeedForwardSpec, d_model: int, lora: Lora | None) -> FeedForward:
    match spec:
        case DenseSpec():
            return DenseFeedForward(
                d_model, d_ff=spec.d_ff, activation=spec.activation, bias=spec.bias, lora=lora
            )
        case SigmaMoESpec() | MoESpec():
            router = build_router(
                spec.router, d_model, n_experts=spec.n_experts, top_k=spec.top_k, balance=spec.balance
            )
            return ExpertFeedForward(
                d_model,
                d_expert=spec.d_expert,
                router=router,
                activation=spec.activation,
                bias=spec.bias,
                n_shared=spec.n_shared if isinstance(spec, MoESpec) else 0,
                uniform_fan_in=isinstance(spec, MoESpec) and spec.init == "uniform_fan_in",
                lora=lora,
            )
        case _:
            assert_never(spec)


def build_norm(spec: NormSpec, d_model: int, *, n_repeats: int | None = None) -> Norm:
    match spec:
        case LayerNormSpec():
            return LayerNorm(d_model, eps=spec.eps, n_repeats=n_repeats)
        case RMSNormSpec():
            return RMSNorm(d_model, eps=spec.eps, n_repeats=n_repeats)
        case _:
            assert_never(spec)


def build_position(spec: PositionSpec, *, n_heads: int, d_head: int, n_positions: int) -> Position:
    match spec:
        case NoPositionSpec():
            return NoPosition()
        case RopeSpec():
            return Rope(n_rotated=spec.rotated_channels(d_head), base=spec.base, n_positions=n_positions)
        case RelativeSpec():
            return Relative(n_heads=n_heads, d_head=d_head, max_distance=spec.max_distance)
        case _:
            assert_never(spec)
