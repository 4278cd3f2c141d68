"""Auxiliary terms that keep routers from using a few experts only.

A term is computed once per router of a member, from sums pooled over all its applications, so that running a layer
more often never scales its coefficient. `scope` says over which tokens the sums run before the formula is applied.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moeut_compose.spec.base import Spec, Weight

Scope = Literal["sequence", "micro_batch"]


class EntropySpec(Spec):
    """Minus the entropy of mean expert usage (sigma-MoE, arXiv:2310.10837; MoEUT pools it over repeats, per sequence)."""

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
    """Minus the mutual information of token and expert, H(expert | token) - H(expert) (SUT, arXiv:2310.07096)."""

    kind: Literal["mutual_information"] = "mutual_information"
    weight: Weight
    scope: Scope = "micro_batch"


class MutualInformationAsCodedSpec(Spec):
    """H(expert | token) + H(expert): what the published SUT runs minimised, sign of the second term included."""

    kind: Literal["mutual_information_as_coded"] = "mutual_information_as_coded"
    weight: Weight
    scope: Scope = "micro_batch"


BalanceSpec = Annotated[
    EntropySpec | SwitchSpec | ZLossSpec | CVSquaredSpec | MutualInformationSpec | MutualInformationAsCodedSpec,
    Field(discriminator="kind"),
]


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


BalanceTerms = Annotated[
    list[BalanceSpec],
    BeforeValidator(_one_or_many, json_schema_input_type=BalanceSpec | list[BalanceSpec]),
]
"""One term or a list of terms; an empty list switches balancing off."""
