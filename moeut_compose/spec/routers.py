"""Routers: how a token scores, selects and weighs its experts."""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Fraction, Spec


class LinearRouterSpec(Spec):
    """What all routers with one linear map share in size."""

    def num_params(self, *, d_model: int, n_experts: int) -> int:
        return d_model * n_experts

    def macs(self, *, d_model: int, n_experts: int) -> int:
        return d_model * n_experts


class SigmoidRouterSpec(LinearRouterSpec):
    """Sigmoid of each logit, top-k, weights not normalised (sigma-MoE, arXiv:2310.10837)."""

    kind: Literal["sigmoid"] = "sigmoid"
    expert_dropout: Fraction = 0.0
    """Probability that an expert is hidden from a token in training."""


class SoftmaxRouterSpec(LinearRouterSpec):
    """Softmax over all experts before top-k (GShard, Switch), or over the chosen ones after it (Mixtral)."""

    kind: Literal["softmax"] = "softmax"
    order: Literal["before_top_k", "after_top_k"] = "before_top_k"
    normalize: bool = False
    """Divide the weights by their sum over the chosen experts."""
    expert_dropout: Fraction = 0.0
    """Probability that an expert is hidden from a token in training."""


class MLPRouterSpec(Spec):
    """Linear, tanh, linear, softmax, top-k renormalised (SUT, arXiv:2310.07096)."""

    kind: Literal["mlp"] = "mlp"
    n_sampled: Annotated[int, Field(ge=0)] = 0
    """How many of the top_k experts are sampled instead of taken in order, in training."""

    def num_params(self, *, d_model: int, n_experts: int) -> int:
        return d_model * d_model + d_model + d_model * n_experts

    def macs(self, *, d_model: int, n_experts: int) -> int:
        return d_model * d_model + d_model * n_experts


RouterSpec = Annotated[SigmoidRouterSpec | SoftmaxRouterSpec | MLPRouterSpec, Field(discriminator="kind")]
