"""What tells the passes through a stage apart: the stage's input again, the number of the pass, own small changes.

Every part is an option of a stage, so a looped model is a combination and no kind of its own.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Count, Spec


class NoInjectionSpec(Spec):
    """Later passes see the stage's input only through the state."""

    kind: Literal["none"] = "none"

    def num_params(self, d_model: int) -> int:
        return 0

    def macs(self, d_model: int, *, n_later: int) -> int:
        return 0


class AddInjectionSpec(Spec):
    """Every pass begins with state + input, the first with the input alone (arXiv:2311.12424)."""

    kind: Literal["add"] = "add"

    def num_params(self, d_model: int) -> int:
        return 0

    def macs(self, d_model: int, *, n_later: int) -> int:
        return 0


class GateInjectionSpec(Spec):
    """Every later pass begins with g state + (1 - g) input, where g = sigmoid(W [state; input] + b)."""

    kind: Literal["gate"] = "gate"

    def num_params(self, d_model: int) -> int:
        return 2 * d_model * d_model + d_model

    def macs(self, d_model: int, *, n_later: int) -> int:
        return n_later * 2 * d_model * d_model


class ConcatInjectionSpec(Spec):
    """Every pass begins with W [state; input], the first with a state of zero (arXiv:2502.05171)."""

    kind: Literal["concat"] = "concat"

    def num_params(self, d_model: int) -> int:
        return 2 * d_model * d_model

    def macs(self, d_model: int, *, n_later: int) -> int:
        return (n_later + 1) * 2 * d_model * d_model


InjectionSpec = Annotated[
    NoInjectionSpec | AddInjectionSpec | GateInjectionSpec | ConcatInjectionSpec, Field(discriminator="kind")
]


class NoStepSpec(Spec):
    """Passes do not know their number."""

    kind: Literal["none"] = "none"

    def num_params(self, d_model: int, repeats: int) -> int:
        return 0


class SinusoidalStepSpec(Spec):
    """Add sinusoids of the number of the pass to the state (Universal Transformer, arXiv:1807.03819)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    positions: bool = True
    """Add those of the position as well, in every pass."""

    def num_params(self, d_model: int, repeats: int) -> int:
        return 0


class LearnedStepSpec(Spec):
    """Add a vector of each pass to the state; the vectors start at zero."""

    kind: Literal["learned"] = "learned"

    def num_params(self, d_model: int, repeats: int) -> int:
        return repeats * d_model


StepSpec = Annotated[NoStepSpec | SinusoidalStepSpec | LearnedStepSpec, Field(discriminator="kind")]


class LoraSpec(Spec):
    """A low-rank change of every dense linear map of a layer, for each pass (relaxed recursion, arXiv:2410.20672).

    Dense are all projections of attention, queries and keys of SwitchHead, keys and values of mixture of
    attention, dense feedforwards and shared experts. Routed experts and routers stay the same in all passes.
    """

    rank: Count

    def num_params(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Parameters of one pass for linear maps of these `(d_in, d_out)`; as many multiply-accumulates a token."""
        return sum(self.rank * (d_in + d_out) for d_in, d_out in shapes)
