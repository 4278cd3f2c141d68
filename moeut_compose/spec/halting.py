"""Halting: how many passes a token takes through a stage."""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Fraction, Spec, Weight


class NoHaltingSpec(Spec):
    """Every token takes every pass."""

    kind: Literal["none"] = "none"

    def num_params(self, d_model: int) -> int:
        return 0

    def macs(self, d_model: int, repeats: int) -> int:
        return 0


class ActSpec(Spec):
    """Stick-breaking (SUT, arXiv:2310.07096): later passes read keys and values from the halted mixture."""

    kind: Literal["act"] = "act"
    threshold: Fraction = 0.999
    """A token rests once its halted probability mass exceeds this."""
    weight: Weight = 0.01
    """Coefficient of the expected depth, summed over passes as in the published runs."""

    def num_params(self, d_model: int) -> int:
        return d_model * d_model + d_model + 2 * d_model

    def macs(self, d_model: int, repeats: int) -> int:
        return (repeats - 1) * (d_model * d_model + 2 * d_model)


HaltingSpec = Annotated[NoHaltingSpec | ActSpec, Field(discriminator="kind")]
