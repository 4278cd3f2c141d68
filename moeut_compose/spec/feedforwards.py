"""Feedforwards: how a layer mixes channels, and what that costs per token.

Counts follow the conventions of `moeut_compose.measure.macs`: `macs` holds matrix products only, `paper_macs`
is the formula published with the runs of arXiv:2405.16039.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moeut_compose.spec.balance import BalanceTerms, EntropySpec
from moeut_compose.spec.base import Count, Fraction, Spec
from moeut_compose.spec.routers import RouterSpec, SigmoidRouterSpec, check_routing

Activation = Literal["relu", "gelu", "silu", "swiglu"]


def _up_width(width: int, activation: Activation) -> int:
    """Columns of the up projection: a gated activation needs two for every hidden channel."""
    return 2 * width if activation == "swiglu" else width


class DenseSpec(Spec):
    """Two linear maps with an activation between them."""

    kind: Literal["dense"] = "dense"
    d_ff: Count
    activation: Activation = "relu"
    bias: bool = True

    @property
    def has_router(self) -> bool:
        return False

    def num_params(self, d_model: int) -> int:
        up = _up_width(self.d_ff, self.activation)
        return d_model * (up + self.d_ff) + (up + d_model if self.bias else 0)

    def active_params(self, d_model: int) -> int:
        return self.num_params(d_model)

    def macs(self, d_model: int) -> dict[str, int]:
        return {"ffn": d_model * (_up_width(self.d_ff, self.activation) + self.d_ff)}

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps."""
        return [(d_model, _up_width(self.d_ff, self.activation)), (self.d_ff, d_model)]

    def paper_macs(self, d_model: int) -> dict[str, int]:
        return self.macs(d_model)


class ExpertFeedForwardSpec(Spec):
    """What feedforwards with routed experts have in common."""

    n_experts: Count
    d_expert: Count
    top_k: Count

    @property
    def has_router(self) -> bool:
        return True

    def _expert_params(self, d_model: int, *, activation: Activation, bias: bool) -> int:
        return DenseSpec(d_ff=self.d_expert, activation=activation, bias=bias).num_params(d_model)

    def _expert_macs(self, d_model: int, *, activation: Activation) -> int:
        return d_model * (_up_width(self.d_expert, activation) + self.d_expert)


class SigmaMoESpec(ExpertFeedForwardSpec):
    """Sigmoid-routed experts whose weights are not normalised (sigma-MoE, arXiv:2310.10837)."""

    kind: Literal["sigma_moe"] = "sigma_moe"
    activation: Activation = "relu"
    bias: bool = False
    expert_dropout: Fraction = 0.0
    """Probability that an expert is hidden from a token in training."""
    balance: BalanceTerms = [EntropySpec(weight=0.01)]

    @model_validator(mode="after")
    def _routing_works(self) -> Self:
        check_routing(self.router, self.balance, n_experts=self.n_experts, top_k=self.top_k)
        return self

    @property
    def router(self) -> SigmoidRouterSpec:
        return SigmoidRouterSpec(expert_dropout=self.expert_dropout)

    def num_params(self, d_model: int) -> int:
        experts = self.n_experts * self._expert_params(d_model, activation=self.activation, bias=self.bias)
        return experts + self.router.num_params(d_model=d_model, n_experts=self.n_experts)

    def active_params(self, d_model: int) -> int:
        experts = self.top_k * self._expert_params(d_model, activation=self.activation, bias=self.bias)
        return experts + self.router.num_params(d_model=d_model, n_experts=self.n_experts)

    def macs(self, d_model: int) -> dict[str, int]:
        return {
            "ffn": self.top_k * self._expert_macs(d_model, activation=self.activation),
            "ffn_select": self.router.macs(d_model=d_model, n_experts=self.n_experts),
        }

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps: there are none."""
        return []

    def paper_macs(self, d_model: int) -> dict[str, int]:
        return self.macs(d_model)


class MoESpec(ExpertFeedForwardSpec):
    """Experts behind any router, with optional always-on shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    kind: Literal["moe"] = "moe"
    router: RouterSpec
    n_shared: Annotated[int, Field(ge=0)] = 0
    """Experts of width d_expert that every token uses, outside the router's choice; one dense feedforward."""
    activation: Activation = "relu"
    bias: bool = False
    init: Literal["depth_scaled", "uniform_fan_in"] = "depth_scaled"
    """depth_scaled: as sigma-MoE; uniform_fan_in: U(-1/fan_in, 1/fan_in) as in SUT."""
    balance: BalanceTerms = []

    @model_validator(mode="after")
    def _routing_works(self) -> Self:
        check_routing(self.router, self.balance, n_experts=self.n_experts, top_k=self.top_k)
        return self

    @property
    def n_slots(self) -> int:
        """Routed experts that a token meets."""
        return self.router.n_slots(n_experts=self.n_experts, top_k=self.top_k)

    @property
    def shared(self) -> DenseSpec | None:
        """The shared experts as the one dense feedforward that they are."""
        if not self.n_shared:
            return None
        return DenseSpec(d_ff=self.n_shared * self.d_expert, activation=self.activation, bias=self.bias)

    def num_params(self, d_model: int) -> int:
        return self._params(d_model, self.n_experts)

    def active_params(self, d_model: int) -> int:
        return self._params(d_model, self.n_slots)

    def _params(self, d_model: int, n_experts: int) -> int:
        experts = n_experts * self._expert_params(d_model, activation=self.activation, bias=self.bias)
        shared = self.shared.num_params(d_model) if self.shared else 0
        return experts + shared + self.router.num_params(d_model=d_model, n_experts=self.n_experts)

    def macs(self, d_model: int) -> dict[str, int]:
        return {
            "ffn": (self.n_slots + self.n_shared) * self._expert_macs(d_model, activation=self.activation),
            "ffn_select": self.router.macs(d_model=d_model, n_experts=self.n_experts),
        }

    def linear_shapes(self, d_model: int) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of the dense linear maps: those of the shared experts."""
        return self.shared.linear_shapes(d_model) if self.shared else []

    def paper_macs(self, d_model: int) -> dict[str, int]:
        raise ValueError("the published formula is undefined for feedforward kind moe")


FeedForwardSpec = Annotated[DenseSpec | SigmaMoESpec | MoESpec, Field(discriminator="kind")]
