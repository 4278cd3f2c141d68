"""Sequence mixers: how a layer moves information between positions, and what that costs per token.

Counts follow the conventions of `moeut_compose.measure.macs`. Scores and values are counted over all
`seq_len` positions, without halving for the causal mask, as published.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moeut_compose.spec.balance import BalanceTerms, EntropySpec
from moeut_compose.spec.base import Count, Fraction, Spec
from moeut_compose.spec.positions import PositionSpec
from moeut_compose.spec.routers import MLPRouterSpec, RouterSpec, SigmoidRouterSpec, check_routing


class AttentionSpec(Spec):
    """Softmax attention with dense projections."""

    kind: Literal["attention"] = "attention"
    n_heads: Count
    d_head: Count
    position: PositionSpec | None = None
    """Overrides the model's position."""

    def num_params(self, d_model: int, position: PositionSpec) -> int:
        inner = self.n_heads * self.d_head
        return 4 * d_model * inner + position.num_params(n_heads=self.n_heads, d_head=self.d_head)

    def active_params(self, d_model: int, position: PositionSpec) -> int:
        return self.num_params(d_model, position)

    def macs(self, d_model: int, seq_len: int, position: PositionSpec) -> dict[str, int]:
        inner = self.n_heads * self.d_head
        return {
            "attn_scores_values": 2 * inner * seq_len,
            "attn_proj": 4 * d_model * inner,
            "attn_relpos": position.macs(n_heads=self.n_heads, d_head=self.d_head),
        }

    def paper_macs(self, d_model: int, seq_len: int) -> dict[str, int]:
        inner = self.n_heads * self.d_head
        return {"attn_scores_values": 2 * inner * seq_len, "attn_proj": 4 * d_model * inner}

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps."""
        inner = self.n_heads * self.d_head
        return [(d_model, inner), (d_model, inner), (d_model, inner), (inner, d_model)]

    def cache_width(self) -> int:
        return 2 * self.n_heads * self.d_head


class SwitchHeadSpec(Spec):
    """Attention with experts of each head for values and outputs (SwitchHead, arXiv:2312.07987)."""

    kind: Literal["switch_head"] = "switch_head"
    n_heads: Count
    d_head: Count
    n_experts: Count
    """Experts of each head, for the value and for the output projection separately."""
    top_k: Count
    gates: Literal["both", "output"] = "both"
    """With one expert: gate values and outputs (the published runs) or outputs only (the clean release)."""
    expert_dropout: Fraction = 0.0
    """Probability that an expert is hidden from a token in training, drawn for each head and router."""
    balance: BalanceTerms = [EntropySpec(weight=0.001)]
    position: PositionSpec | None = None
    """Overrides the model's position."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        check_routing(self.router, self.balance, n_experts=self.n_experts, top_k=self.top_k)
        if self.gates == "output" and self.n_experts > 1:
            raise ValueError(
                f"gates: output needs n_experts: 1 (a choice among {self.n_experts} needs both gates)"
            )
        return self

    @property
    def router(self) -> SigmoidRouterSpec:
        return SigmoidRouterSpec(expert_dropout=self.expert_dropout)

    @property
    def n_routers(self) -> int:
        return 2 if self.gates == "both" else 1

    def num_params(self, d_model: int, position: PositionSpec) -> int:
        inner = self.n_heads * self.d_head
        routers = self.n_routers * self.n_heads * self.n_experts * d_model
        projections = 2 * d_model * inner + 2 * self.n_experts * d_model * inner
        return projections + routers + position.num_params(n_heads=self.n_heads, d_head=self.d_head)

    def active_params(self, d_model: int, position: PositionSpec) -> int:
        idle = 2 * (self.n_experts - self.top_k) * d_model * self.n_heads * self.d_head
        return self.num_params(d_model, position) - idle

    def macs(self, d_model: int, seq_len: int, position: PositionSpec) -> dict[str, int]:
        inner = self.n_heads * self.d_head
        return {
            "attn_scores_values": 2 * inner * seq_len,
            "attn_proj": 2 * d_model * inner + 2 * self.top_k * d_model * inner,
            "attn_select": self.n_routers * d_model * self.n_heads * self.n_experts,
            "attn_relpos": position.macs(n_heads=self.n_heads, d_head=self.d_head),
        }

    def paper_macs(self, d_model: int, seq_len: int) -> dict[str, int]:
        inner = self.n_heads * self.d_head
        return {
            "attn_scores_values": 2 * inner * seq_len,
            "attn_proj": (2 * self.top_k + 2) * d_model * inner + 2 * self.top_k * inner,
            "attn_select": 2 * self.n_experts * d_model,
        }

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps: queries and keys."""
        return [(d_model, self.n_heads * self.d_head)] * 2

    def cache_width(self) -> int:
        return 2 * self.n_heads * self.d_head


class MixtureOfAttentionSpec(Spec):
    """Experts are bundles of heads over shared keys and values (SUT, arXiv:2310.07096)."""

    kind: Literal["mixture_of_attention"] = "mixture_of_attention"
    n_experts: Count
    d_expert: Count
    """Width of one expert's query: n_heads x d_head."""
    d_head: Count
    top_k: Count
    router: RouterSpec = MLPRouterSpec()
    balance: BalanceTerms = []
    position: PositionSpec | None = None
    """Overrides the model's position."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        check_routing(self.router, self.balance, n_experts=self.n_experts, top_k=self.top_k)
        if self.d_expert % self.d_head:
            raise ValueError(f"d_expert={self.d_expert} is not a multiple of d_head={self.d_head}")
        return self

    @property
    def n_heads(self) -> int:
        """Heads inside one expert."""
        return self.d_expert // self.d_head

    @property
    def n_active(self) -> int:
        """Experts that a token meets."""
        return self.router.n_slots(n_experts=self.n_experts, top_k=self.top_k)

    def num_params(self, d_model: int, position: PositionSpec) -> int:
        experts = 2 * self.n_experts * d_model * self.d_expert
        shared = 2 * d_model * self.d_expert + position.num_params(n_heads=self.n_heads, d_head=self.d_head)
        return experts + shared + self.router.num_params(d_model=d_model, n_experts=self.n_experts)

    def active_params(self, d_model: int, position: PositionSpec) -> int:
        return (
            self.num_params(d_model, position)
            - 2 * (self.n_experts - self.n_active) * d_model * self.d_expert
        )

    def macs(self, d_model: int, seq_len: int, position: PositionSpec) -> dict[str, int]:
        return {
            "attn_scores_values": 2 * self.n_active * self.d_expert * seq_len,
            "attn_proj": 2 * d_model * self.d_expert + 2 * self.n_active * d_model * self.d_expert,
            "attn_select": self.router.macs(d_model=d_model, n_experts=self.n_experts),
            "attn_relpos": self.n_active * position.macs(n_heads=self.n_heads, d_head=self.d_head),
        }

    def paper_macs(self, d_model: int, seq_len: int) -> dict[str, int]:
        raise ValueError("the published formula is undefined for mixer kind mixture_of_attention")

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps: keys and values."""
        return [(d_model, self.d_expert)] * 2

    def cache_width(self) -> int:
        return 2 * self.d_expert


MixerSpec = Annotated[AttentionSpec | SwitchHeadSpec | MixtureOfAttentionSpec, Field(discriminator="kind")]
