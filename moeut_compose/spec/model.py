"""The architecture: what a model is, before anything is built."""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from moeut_compose.spec.base import Count, Spec
from moeut_compose.spec.loops import LoraSpec
from moeut_compose.spec.norms import LayerNormSpec, NormSpec
from moeut_compose.spec.positions import PositionSpec, RopeSpec
from moeut_compose.spec.stages import LayerSpec, StageSpec


class EmbeddingSpec(Spec):
    """Token embedding, drawn from N(0, 1/d_model)."""

    scale: Literal[1, "sqrt_d_model"] = 1
    """Factor on the embedded tokens."""
    norm: Literal["none", "layer_norm"] = "none"
    """Normalise the scaled embedding; this norm has no parameters."""


class HeadSpec(Spec):
    """The map from the last hidden state to vocabulary logits."""

    bias: bool = True
    tied: bool = False
    """Use the embedding matrix as the weight."""


class Member(NamedTuple):
    """A layer with weights of its own, its place, and the settings it inherits from the model."""

    path: str
    stage: int
    index: int  # type: ignore[assignment]
    layer: LayerSpec
    norm: NormSpec
    position: PositionSpec
    applications: int
    has_own_norms: bool = False
    """Whether every application has norms of its own."""
    lora: LoraSpec | None = None

    def num_params(self, d_model: int) -> int:
        mixer = self.layer.mixer.num_params(d_model, self.position)
        return mixer + self.layer.feedforward.num_params(d_model) + self._norm_and_lora_params(d_model)

    def active_params(self, d_model: int) -> int:
        """What one token reads, each number once."""
        return self._active_blocks(d_model) + self._norm_and_lora_params(d_model)

    def unrolled_params(self, d_model: int) -> int:
        """What one token reads, counted as often as it is read."""
        once = 2 * self.norm.num_params(d_model) + sum(self.lora_macs(d_model).values())
        return self.applications * (self._active_blocks(d_model) + once)

    def lora_macs(self, d_model: int) -> dict[str, int]:
        """Multiply-accumulates of the low-rank changes in one application: as many as they have parameters."""
        if self.lora is None:
            return {}
        return {
            "attn_proj": self.lora.num_params(self.layer.mixer.linear_shapes(d_model)),
            "ffn": self.lora.num_params(self.layer.feedforward.linear_shapes(d_model)),
        }

    def _active_blocks(self, d_model: int) -> int:
        mixer = self.layer.mixer.active_params(d_model, self.position)
        return mixer + self.layer.feedforward.active_params(d_model)

    def norm_params(self, d_model: int) -> int:
        """Both norms, in all passes where each has its own."""
        return 2 * (self.applications if self.has_own_norms else 1) * self.norm.num_params(d_model)

    def lora_params(self, d_model: int) -> int:
        """The low-rank changes of all passes."""
        return self.applications * sum(self.lora_macs(d_model).values())

    def _norm_and_lora_params(self, d_model: int) -> int:
        return self.norm_params(d_model) + self.lora_params(d_model)


class ModelSpec(Spec):
    """A language model: embedding, stages of shared layers, final norm, head."""

    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    vocab_size: Count
    context_length: Count
    d_model: Count
    embedding: EmbeddingSpec = EmbeddingSpec()
    norm: NormSpec = LayerNormSpec(placement="pre")
    position: PositionSpec = RopeSpec()
    stages: Annotated[list[StageSpec], Field(min_length=1)]
    final_norm: bool = True
    """A norm before the head; the published post-norm models have none."""
    head: HeadSpec = HeadSpec()

    @model_validator(mode="after")
    def _peri_has_a_router(self) -> Self:
        wrong = [
            member
            for member in self.members()
            if member.norm.placement == "peri" and not member.layer.feedforward.has_router
        ]
        if wrong:
            those = "this layer" if len(wrong) == 1 else "each"
            kinds = " or ".join(dict.fromkeys(member.layer.feedforward.kind for member in wrong))
            raise ValueError(
                f"{', '.join(member.path for member in wrong)}: placement peri normalises what routers and attention "
                f"scores read, and a {kinds} feedforward has no router; give {those} a norm with "
                "placement pre or post"
            )
        return self

    @property
    def depth(self) -> int:
        """Layer applications in one forward pass."""
        return sum(stage.depth for stage in self.stages)

    def members(self) -> Iterator[Member]:
        """Every layer with weights of its own, once."""
        for stage_index, stage in enumerate(self.stages):
            for index, layer in enumerate(stage.members()):
                yield Member(
                    path=f"stages.{stage_index}.layers.{index}",
                    stage=stage_index,
                    index=index,
                    layer=layer,
                    norm=layer.norm or self.norm,
                    position=layer.mixer.position or self.position,
                    applications=stage.repeats,
                    has_own_norms=stage.norms == "per_repeat",
                    lora=stage.lora,
                )

    def embedding_params(self) -> int:
        return self.vocab_size * self.d_model

    def head_params(self) -> int:
        weight = 0 if self.head.tied else self.vocab_size * self.d_model
        return weight + (self.vocab_size if self.head.bias else 0)

    def final_norm_params(self) -> int:
        return self.norm.num_params(self.d_model) if self.final_norm else 0

    def layer_params(self) -> int:
        """Parameters of all stages, each shared layer once."""
        outside = sum(stage.own_params(self.d_model) for stage in self.stages)
        return outside + sum(member.num_params(self.d_model) for member in self.members())

    def num_params(self) -> int:
        return self.embedding_params() + self.layer_params() + self.final_norm_params() + self.head_params()
