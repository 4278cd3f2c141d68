"""Routers and their balance terms from specs."""

from __future__ import annotations

from typing import assert_never

from moeut_compose.blocks import balance as terms
from moeut_compose.blocks.roles import Router
from moeut_compose.blocks.routers import MLPRouter, SigmoidRouter, SoftmaxRouter
from moeut_compose.blocks.steered_routers import BiasedSigmoidRouter, ReluRouter
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
from moeut_compose.spec.routers import (
    BiasedSigmoidRouterSpec,
    MLPRouterSpec,
    ReluRouterSpec,
    RouterSpec,
    SigmoidRouterSpec,
    SoftmaxRouterSpec,
)


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
