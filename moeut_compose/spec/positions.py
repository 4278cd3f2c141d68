"""How attention learns where a token stands."""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import Count, Fraction, PositiveFloat, Spec


class NoPositionSpec(Spec):
    """No position information beyond the causal mask."""

    kind: Literal["none"] = "none"

    def num_params(self, *, n_heads: int, d_head: int) -> int:
        return 0

    def macs(self, *, n_heads: int, d_head: int) -> int:
        return 0


class RopeSpec(Spec):
    """Rotary embedding of the first channels of every head (arXiv:2104.09864), half-split convention."""

    kind: Literal["rope"] = "rope"
    fraction: Fraction = 0.5
    """Share of each head that is rotated; the width is rounded down to an even number."""
    base: PositiveFloat = 10000.0

    def num_params(self, *, n_heads: int, d_head: int) -> int:
        return 0

    def macs(self, *, n_heads: int, d_head: int) -> int:
        return 0

    def rotated_channels(self, d_head: int) -> int:
        return int(self.fraction * d_head) // 2 * 2


class RelativeSpec(Spec):
    """Learned vectors for clipped distances, multiplied with the query (SUT, arXiv:2310.07096)."""

    kind: Literal["relative"] = "relative"
    max_distance: Count = 64
    """Distances of this size and beyond share one vector; the table has 2 x max_distance + 1 columns."""

    def num_params(self, *, n_heads: int, d_head: int) -> int:
        return n_heads * d_head * (2 * self.max_distance + 1)

    def macs(self, *, n_heads: int, d_head: int) -> int:
        return n_heads * d_head * (2 * self.max_distance + 1)


PositionSpec = Annotated[NoPositionSpec | RopeSpec | RelativeSpec, Field(discriminator="kind")]
