"""Routers: how a token scores, selects and weighs its experts.

`top_k` and the number of experts belong to the block that is routed, everything else to the router.
"""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.balance import BalanceSpec
from moeut_compose.spec.base import Count, Fraction, PositiveFloat, Spec, Weight


class AnyRouterSpec(Spec):
    """What all routers have in common."""

    expert_dropout: Fraction = 0.0
    """Probability that an expert is hidden from a token in training."""

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token add up to a constant, so that a single choice learns nothing."""
        return False

    def n_slots(self, *, n_experts: int, top_k: int) -> int:
        """Experts that the products make room for, for every token."""
        return top_k


class LinearRouterSpec(AnyRouterSpec):
    """What all routers with one linear map share in size."""

    def num_params(self, *, d_model: int, n_experts: int) -> int:
        return d_model * n_experts

    def macs(self, *, d_model: int, n_experts: int) -> int:
        return d_model * n_experts


class SigmoidRouterSpec(LinearRouterSpec):
    """Sigmoid of each logit, top-k, weights not normalised (sigma-MoE, arXiv:2310.10837)."""

    kind: Literal["sigmoid"] = "sigmoid"


class SoftmaxRouterSpec(LinearRouterSpec):
    """Softmax over all experts before top-k (GShard, Switch), or over the chosen ones after it (Mixtral)."""

    kind: Literal["softmax"] = "softmax"
    order: Literal["before_top_k", "after_top_k"] = "before_top_k"
    normalize: bool = False
    """Divide the weights by their sum over the chosen experts."""

    @property
    def normalizes(self) -> bool:
        return self.normalize or self.order == "after_top_k"


class BiasedSigmoidRouterSpec(LinearRouterSpec):
    """Balance by feedback: the choice sees sigmoid + bias, the weights do not (arXiv:2408.15664).

    After each optimiser step the bias of every expert moves by `update_rate` against its load.
    """

    kind: Literal["biased_sigmoid"] = "biased_sigmoid"
    update_rate: Weight = 1e-3
    """How far a bias moves after each step; 0 freezes the biases."""
    normalize: bool = True
    """Divide the weights by their sum over the chosen experts."""
    scale: PositiveFloat = 1.0
    """Factor on the weights."""

    @property
    def normalizes(self) -> bool:
        return self.normalize


class ReluRouterSpec(LinearRouterSpec):
    """Every expert with a positive score, weighed by it (ReMoE, arXiv:2412.14711).

    The balance term `relu_l1` steers the mean number of active experts to `top_k`. Products make room for
    `max_active` experts a token, and that is what multiply-accumulates are counted with.
    """

    kind: Literal["relu"] = "relu"
    max_active: Count | None = None
    """Use no more than the highest so many scores of a token; none: all experts may be active."""

    def n_slots(self, *, n_experts: int, top_k: int) -> int:
        return self.max_active or n_experts


class MLPRouterSpec(AnyRouterSpec):
    """Linear, tanh, linear, softmax, top-k renormalised (SUT, arXiv:2310.07096)."""

    kind: Literal["mlp"] = "mlp"
    n_sampled: Annotated[int, Field(ge=0)] = 0
    """How many of the top_k experts are sampled instead of taken in order, in training."""

    @property
    def normalizes(self) -> bool:
        return True

    def num_params(self, *, d_model: int, n_experts: int) -> int:
        return d_model * d_model + d_model + d_model * n_experts

    def macs(self, *, d_model: int, n_experts: int) -> int:
        return d_model * d_model + d_model * n_experts


RouterSpec = Annotated[
    SigmoidRouterSpec | SoftmaxRouterSpec | BiasedSigmoidRouterSpec | ReluRouterSpec | MLPRouterSpec,
    Field(discriminator="kind"),
]


def check_routing(router: RouterSpec, balance: list[BalanceSpec], *, n_experts: int, top_k: int) -> None:
    """Raise ValueError, naming the field, for a router that cannot choose or cannot learn."""
    if top_k > n_experts:
        raise ValueError(f"top_k={top_k} exceeds n_experts={n_experts}")
    if isinstance(router, MLPRouterSpec) and router.n_sampled > top_k:
        raise ValueError(f"router.n_sampled={router.n_sampled} exceeds top_k={top_k}")
    if isinstance(router, ReluRouterSpec):
        room = router.n_slots(n_experts=n_experts, top_k=top_k)
        if not top_k <= room <= n_experts:
            raise ValueError(f"router.max_active={room} must lie between {top_k=} and {n_experts=}")
    if router.normalizes and top_k == 1:
        raise ValueError(
            "top_k=1 with weights normalised over the choice is always 1 and gives the router no gradient; "
            "use a softmax router with order: before_top_k and normalize: false, or a sigmoid router"
        )
    for term in balance:
        if term.kind == "relu_l1" and not isinstance(router, ReluRouterSpec):
            raise ValueError(
                f"balance: relu_l1 steers ReLU routers, and this router is of kind {router.kind}"
            )
