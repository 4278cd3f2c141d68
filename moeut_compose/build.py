"""From spec to module: the only file that knows both sides.

Each `build_*` is one `match` over a closed union; the type checker proves that no variant is missing.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn

from moeut_compose.blocks import balance as terms
from moeut_compose.blocks.feedforwards import DenseFeedForward, ExpertFeedForward
from moeut_compose.blocks.graves_act import GravesACT
from moeut_compose.blocks.halting import AnyHalting, NoHalting
from moeut_compose.blocks.layers import Layer, PeriNormLayer, PostNormLayer, PreNormLayer
from moeut_compose.blocks.mixers import Attention, MixtureOfAttention, SwitchHead
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.norms import LayerNorm, RMSNorm, Unscaled
from moeut_compose.blocks.positions import NoPosition, Relative, Rope
from moeut_compose.blocks.roles import FeedForward, Mixer, Position, Router
from moeut_compose.blocks.routers import MLPRouter, SigmoidRouter, SoftmaxRouter
from moeut_compose.blocks.stages import Stage
from moeut_compose.blocks.steered_routers import BiasedSigmoidRouter, ReluRouter
from moeut_compose.blocks.stick_breaking import StickBreaking
from moeut_compose.spec.balance import (
    BalanceSpec,
    CVSquaredSpec,
    EntropySpec,
    MutualInformationAsCodedSpec,
    MutualInformationSpec,
    ReluL1Spec,
    SwitchSpec,
    ZLossSpec,
)
from moeut_compose.spec.feedforwards import DenseSpec, FeedForwardSpec, MoESpec, SigmaMoESpec
from moeut_compose.spec.halting import ActSpec, GravesActSpec, HaltingSpec, NoHaltingSpec
from moeut_compose.spec.mixers import AttentionSpec, MixerSpec, MixtureOfAttentionSpec, SwitchHeadSpec
from moeut_compose.spec.model import Member, ModelSpec
from moeut_compose.spec.norms import LayerNormSpec, NormSpec, RMSNormSpec
from moeut_compose.spec.positions import NoPositionSpec, PositionSpec, RelativeSpec, RopeSpec
from moeut_compose.spec.routers import (
    BiasedSigmoidRouterSpec,
    MLPRouterSpec,
    ReluRouterSpec,
    RouterSpec,
    SigmoidRouterSpec,
    SoftmaxRouterSpec,
)
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
    mixer = build_mixer(member.layer.mixer, spec, member.position)
    feedforward = build_feedforward(member.layer.feedforward, spec.d_model)
    norms = build_norm(member.norm, spec.d_model), build_norm(member.norm, spec.d_model)
    match member.norm.placement:
        case "pre":
            return PreNormLayer(mixer, feedforward, *norms)
        case "post":
            return PostNormLayer(mixer, feedforward, *norms)
        case "peri":
            return PeriNormLayer(mixer, feedforward, *norms)
        case _:
            assert_never(member.norm.placement)


def build_mixer(spec: MixerSpec, model: ModelSpec, position_spec: PositionSpec) -> Mixer:
    d_model = model.d_model
    position = build_position(
        position_spec, n_heads=spec.n_heads, d_head=spec.d_head, n_positions=model.context_length
    )
    match spec:
        case AttentionSpec():
            return Attention(d_model, n_heads=spec.n_heads, d_head=spec.d_head, position=position)
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
            )
        case MixtureOfAttentionSpec():
            router_module = build_router(
                spec.router, d_model, n_experts=spec.n_experts, top_k=spec.top_k, balance=spec.balance
            )
            return MixtureOfAttention(
                d_model, d_expert=spec.d_expert, d_head=spec.d_head, router=router_module, position=position
            )
        case _:
            assert_never(spec)


def build_feedforward(spec: FeedForwardSpec, d_model: int) -> FeedForward:
    match spec:
        case DenseSpec():
            return DenseFeedForward(d_model, d_ff=spec.d_ff, activation=spec.activation, bias=spec.bias)
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
            )
        case _:
            assert_never(spec)


def build_router(
    spec: RouterSpec, d_model: int, *, n_experts: int, top_k: int, balance: list[BalanceSpec]
) -> Router:
    observed = build_balance(balance, top_k=top_k)
    match spec:
        case SigmoidRouterSpec():
            return SigmoidRouter(
                d_model,
                n_experts=n_experts,
                top_k=top_k,
                expert_dropout=spec.expert_dropout,
                balance=observed,
            )
        case SoftmaxRouterSpec():
            return SoftmaxRouter(
                d_model,
                n_experts=n_experts,
                top_k=top_k,
                after_top_k=spec.order == "after_top_k",
                normalize=spec.normalize,
                expert_dropout=spec.expert_dropout,
                balance=observed,
            )
        case BiasedSigmoidRouterSpec():
            return BiasedSigmoidRouter(
                d_model,
                n_experts=n_experts,
                top_k=top_k,
                update_rate=spec.update_rate,
                normalize=spec.normalize,
                gate_scale=spec.scale,
                expert_dropout=spec.expert_dropout,
                balance=observed,
            )
        case ReluRouterSpec():
            return ReluRouter(
                d_model,
                n_experts=n_experts,
                top_k=top_k,
                max_active=spec.n_slots(n_experts=n_experts, top_k=top_k),
                expert_dropout=spec.expert_dropout,
                balance=observed,
            )
        case MLPRouterSpec():
            return MLPRouter(
                d_model,
                n_experts=n_experts,
                top_k=top_k,
                n_sampled=spec.n_sampled,
                expert_dropout=spec.expert_dropout,
                balance=observed,
            )
        case _:
            assert_never(spec)


def build_balance(specs: list[BalanceSpec], *, top_k: int) -> list[terms.Balance]:
    return [_build_balance_term(spec, top_k) for spec in specs]


def _build_balance_term(spec: BalanceSpec, top_k: int) -> terms.Balance:
    match spec:
        case EntropySpec():
            return terms.Entropy(spec.weight, spec.scope)
        case SwitchSpec():
            return terms.Switch(spec.weight, spec.scope)
        case ZLossSpec():
            return terms.ZLoss(spec.weight, spec.scope)
        case CVSquaredSpec():
            return terms.CVSquared(spec.weight, spec.scope)
        case MutualInformationSpec():
            return terms.MutualInformation(spec.weight, spec.scope)
        case MutualInformationAsCodedSpec():
            return terms.MutualInformationAsCoded(spec.weight, spec.scope)
        case ReluL1Spec():
            return terms.ReluL1(spec.weight, spec.scope, spec.factor, top_k)
        case _:
            assert_never(spec)


def build_norm(spec: NormSpec, d_model: int) -> nn.Module:
    match spec:
        case LayerNormSpec():
            return LayerNorm(d_model, eps=spec.eps)
        case RMSNormSpec():
            return RMSNorm(d_model, eps=spec.eps)
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


def build_halting(spec: HaltingSpec, d_model: int) -> AnyHalting:
    match spec:
        case NoHaltingSpec():
            return NoHalting()
        case ActSpec():
            return StickBreaking(d_model, threshold=spec.threshold, weight=spec.weight)
        case GravesActSpec():
            return GravesACT(d_model, threshold=spec.threshold, weight=spec.weight, gate_bias=spec.gate_bias)
        case _:
            assert_never(spec)
