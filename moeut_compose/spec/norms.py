"""Normalisation layers and where a layer places them.

`pre`   y = x + A(N1 x, N1 x, N1 x);  x' = y + F(N2 y)
`post`  y = N1(x + A(x, x, x));       x' = N2(y + F(y))
`peri`  y = x + A(N1 x, N1 x, x);     x' = y + F(y, routed by N2 y)

Peri is the placement of MoEUT (arXiv:2405.16039, section 2.4): only what ends in a softmax or a sigmoid is
normalised.
"""

from typing import Annotated, Literal

from pydantic import Field

from moeut_compose.spec.base import PositiveFloat, Spec

Placement = Literal["peri", "pre", "post"]


class LayerNormSpec(Spec):
    """Layer normalisation with weight and bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    placement: Placement
    """Where the two norms of a layer stand: peri (MoEUT), pre or post."""
    eps: PositiveFloat = 1e-5

    def num_params(self, d_model: int) -> int:
        return 2 * d_model


class RMSNormSpec(Spec):
    """Root-mean-square normalisation with a weight and no bias."""

    kind: Literal["rms_norm"] = "rms_norm"
    placement: Placement
    """Where the two norms of a layer stand: peri (MoEUT), pre or post."""
    eps: PositiveFloat = 1e-5

    def num_params(self, d_model: int) -> int:
        return d_model


NormSpec = Annotated[LayerNormSpec | RMSNormSpec, Field(discriminator="kind")]
