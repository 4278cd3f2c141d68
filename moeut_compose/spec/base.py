"""The root of every spec: frozen, strict data that knows no tensors.

A spec says what something *is*. Operations on it are pure arithmetic (validation, counting); building a module from
it is the business of `moeut_compose.build`, the only file that knows both sides.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    """Frozen and strict: unknown keys, wrong types and impossible combinations are errors.

    The string below a field describes it; `moeut_compose.spec.schema` reads these when they are asked for, because
    Pydantic would parse every source file at each start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


LARGEST_COUNT = 1 << 24

Count = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
"""A positive integer, small enough that products of a few of them can be counted and allocated."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number between 0 and 1, both included."""

Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""A non-negative, finite coefficient."""

PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A positive, finite number."""
