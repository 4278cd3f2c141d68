"""Stages: groups of layers that run several times, and the schedule that says in which order.

Parameters belong to members (layers with weights of their own); caches and depth-dependent scales belong to
steps.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from moeut_compose.spec.base import Count, Spec
from moeut_compose.spec.feedforwards import FeedForwardSpec
from moeut_compose.spec.halting import HaltingSpec, NoHaltingSpec
from moeut_compose.spec.loops import InjectionSpec, LoraSpec, NoInjectionSpec, NoStepSpec, StepSpec
from moeut_compose.spec.mixers import MixerSpec
from moeut_compose.spec.norms import NormSpec

Pattern = Literal["ABAB", "AABB"]


class LayerSpec(Spec):
    """A mixer and a feedforward; `count` members of this shape, each with weights of its own."""

    count: Count = 1
    mixer: MixerSpec
    feedforward: FeedForwardSpec
    norm: NormSpec | None = None
    """Overrides the model's norm."""


class StageSpec(Spec):
    """A group of layers that runs `repeats` times."""

    pattern: Pattern = "ABAB"
    """ABAB cycles through the members; AABB repeats each member in place."""
    repeats: Count = 1
    """Passes over the group; depth = repeats x number of members."""
    layers: Annotated[list[LayerSpec], Field(min_length=1)]
    halting: HaltingSpec = NoHaltingSpec()
    inject: InjectionSpec = NoInjectionSpec()
    """How the stage's input enters every pass again."""
    step: StepSpec = NoStepSpec()
    """What is added to the state at the beginning of every pass."""
    lora: LoraSpec | None = None
    """A low-rank change of the linear maps for each pass."""
    norms: Literal["shared", "per_repeat"] = "shared"
    """Whether the norms of a layer are the same in all passes, or each pass has its own."""

    @model_validator(mode="after")
    def _passes_exist(self) -> Self:
        if self.pattern == "AABB" and self.n_members > 1:
            for field, spec in (("halting", self.halting), ("inject", self.inject), ("step", self.step)):
                if spec.kind != "none":
                    raise ValueError(
                        f"{field} acts between passes over the group; pattern AABB makes none, use ABAB"
                    )
        return self

    @property
    def n_members(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def depth(self) -> int:
        return self.repeats * self.n_members

    def own_params(self, d_model: int) -> int:
        """Parameters of the stage itself, outside its layers."""
        parts = self.halting.num_params(d_model) + self.inject.num_params(d_model)
        return parts + self.step.num_params(d_model, self.repeats)

    def own_unrolled_params(self, d_model: int) -> int:
        """The same, counted as often as they are read."""
        calls = (self.repeats - 1) * (self.halting.num_params(d_model) + self.inject.num_params(d_model))
        return calls + self.step.num_params(d_model, self.repeats)

    def own_macs(self, d_model: int) -> dict[str, int]:
        """Multiply-accumulates per token of the stage itself, over all passes."""
        mixtures = max(self.repeats - 2, 0) if self.halting.has_mixture else 0
        return {
            "act_gate": self.halting.macs(d_model, self.repeats),
            "injection": self.inject.macs(d_model, n_later=self.repeats - 1 + mixtures),
        }

    def members(self) -> list[LayerSpec]:
        """One entry for every set of weights, in the order of the group."""
        return [layer for layer in self.layers for _ in range(layer.count)]


class Step(NamedTuple):
    """One call of one layer."""

    stage: int
    member: int
    repeat: int


def stage_schedule(n_members: int, repeats: int, pattern: Pattern) -> list[tuple[int, int]]:
    """The `(member, repeat)` pairs of a stage in the order in which they run."""
    if pattern == "ABAB":
        return [(member, repeat) for repeat in range(repeats) for member in range(n_members)]
    return [(member, repeat) for member in range(n_members) for repeat in range(repeats)]


def schedule(stages: Sequence[StageSpec]) -> list[Step]:
    """Every layer call of a forward pass, in order."""
    return [
        Step(index, member, repeat)
        for index, stage in enumerate(stages)
        for member, repeat in stage_schedule(stage.n_members, stage.repeats, stage.pattern)
    ]
