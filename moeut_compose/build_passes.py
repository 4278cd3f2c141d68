"""What happens between the passes through a stage, from specs: halting, injection, step embeddings."""

from __future__ import annotations

from typing import assert_never

from moeut_compose.blocks.graves_act import GravesACT
from moeut_compose.blocks.halting import AnyHalting, NoHalting
from moeut_compose.blocks.loops import (
    AddInjection,
    ConcatInjection,
    GateInjection,
    Injection,
    LearnedStep,
    NoInjection,
    NoStep,
    SinusoidalStep,
    StepEmbedding,
)
from moeut_compose.blocks.stick_breaking import StickBreaking
from moeut_compose.spec.halting import ActSpec, GravesActSpec, HaltingSpec, NoHaltingSpec
from moeut_compose.spec.loops import (
    AddInjectionSpec,
    ConcatInjectionSpec,
    GateInjectionSpec,
    InjectionSpec,
    LearnedStepSpec,
    NoInjectionSpec,
    NoStepSpec,
    SinusoidalStepSpec,
    StepSpec,
)


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


def build_injection(spec: InjectionSpec, d_model: int) -> Injection:
    match spec:
        case NoInjectionSpec():
            return NoInjection()
        case AddInjectionSpec():
            return AddInjection()
        case GateInjectionSpec():
            return GateInjection(d_model)
        case ConcatInjectionSpec():
            return ConcatInjection(d_model)
        case _:
            assert_never(spec)


def build_step(spec: StepSpec, d_model: int, *, n_repeats: int) -> StepEmbedding:
    match spec:
        case NoStepSpec():
            return NoStep()
        case SinusoidalStepSpec():
            return SinusoidalStep(d_model, positions=spec.positions)
        case LearnedStepSpec():
            return LearnedStep(d_model, n_repeats=n_repeats)
        case _:
            assert_never(spec)
