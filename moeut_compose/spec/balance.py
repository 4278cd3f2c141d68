"""Auxiliary terms that keep routers from using a few experts only.

A term is computed once per router of a member, from sums pooled over all its applications, so that running a
layer more often never scales its coefficient. `scope` says over which tokens the sums run before the formula
is applied.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moeut_compose.spec.base import Spec, Weight

Scope = Literal["sequence", "micro_batch"]


class EntropySpec(Spec):
    """Minus the entropy of mean expert usage (sigma-MoE, arXiv:2310.10837; MoEUT, arXiv:2405.16039)."""

    kind: Literal["entropy"] = "entropy"
    weight: Weight
    scope: Scope = "sequence"


class SwitchSpec(Spec):
    """Experts x sum of load x mean probability; 1 when even (Switch, arXiv:2101.03961, equation 4)."""

    kind: Literal["switch"] = "switch"
    weight: Weight
    scope: Scope = "micro_batch"


class ZLossSpec(Spec):
    """Mean squared log-sum-exp of the router logits (ST-MoE, arXiv:2202.08906, equation 5)."""

    kind: Literal["z_loss"] = "z_loss"
    weight: Weight
    scope: Scope = "micro_batch"


class CVSquaredSpec(Spec):
    """Squared coefficient of variation of the summed gates (arXiv:1701.06538, equation 7)."""

    kind: Literal["cv_squared"] = "cv_squared"
    weight: Weight
    scope: Scope = "micro_batch"


class MutualInformationSpec(Spec):
    """Minus the mutual information of token and expert: H(expert | token) - H(expert)."""

    kind: Literal["mutual_information"] = "mutual_information"
    weight: Weight
    scope: Scope = "micro_batch"


class MutualInformationAsCodedSpec(Spec):
    """H(expert | token) + H(expert): what the published SUT runs minimised (SUT, arXiv:2310.07096)."""

    kind: Literal["mutual_information_as_coded"] = "mutual_information_as_coded"
    weight: Weight
    scope: Scope = "micro_batch"


class ReluL1Spec(Spec):
    """Mean score of each expert, weighed with its load (ReMoE, arXiv:2412.14711).

    The coefficient steers itself: after each step it is multiplied by `factor` where more than top_k experts
    were active in the mean, and divided by it where fewer were. Every router has a coefficient of its own.
    """

    kind: Literal["relu_l1"] = "relu_l1"
    weight: Weight = 1e-8
    """The coefficient at the start."""
    scope: Scope = "micro_batch"
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.2


BalanceSpec = Annotated[
    EntropySpec
    | SwitchSpec
    | ZLossSpec
    | CVSquaredSpec
    | MutualInformationSpec
    | MutualInformationAsCodedSpec
    | ReluL1Spec,
    Field(discriminator="kind"),
]


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


BalanceTerms = Annotated[
    list[BalanceSpec],
    BeforeValidator(_one_or_many, json_schema_input_type=BalanceSpec | list[BalanceSpec]),
]
"""One term or a list of terms; an empty list switches balancing off."""
