"""Halting: how many passes a token takes through a stage."""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Fraction, Spec, Weight


class NoHaltingSpec(Spec):
    """Every token takes every pass."""

    kind: Literal["none"] = "none"

    @property
    def has_mixture(self) -> bool:
        """Whether keys and values are read from a mixture beside the running state, from the third pass on."""
        return False

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

    @property
    def has_mixture(self) -> bool:
        return True

    def num_params(self, d_model: int) -> int:
        return d_model * d_model + d_model + 2 * d_model

    def macs(self, d_model: int, repeats: int) -> int:
        return (repeats - 1) * (d_model * d_model + 2 * d_model)


class GravesActSpec(Spec):
    """Adaptive computation time (arXiv:1603.08983), as in the Universal Transformer (arXiv:1807.03819)."""

    kind: Literal["graves_act"] = "graves_act"
    threshold: Fraction = 0.99
    """A token stops once its halting probabilities add up to this: 1 - epsilon."""
    weight: Weight = 0.01
    """Coefficient of passes plus remainder (tau)."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = -3.0
    """Where the bias of the gate starts; a low one makes a fresh model take all passes."""

    @property
    def has_mixture(self) -> bool:
        return False

    def num_params(self, d_model: int) -> int:
        return d_model + 1

    def macs(self, d_model: int, repeats: int) -> int:
        return (repeats - 1) * d_model


HaltingSpec = Annotated[NoHaltingSpec | ActSpec | GravesActSpec, Field(discriminator="kind")]
