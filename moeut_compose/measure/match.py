"""Matching: choose an integer of one architecture so that it equals another in parameters or arithmetic.

The quantity is computed exactly by the closed forms, so the answer is the closest value there is, not an estimate. What
matters grows with every size field (experts, widths, counts, depth), hence bisection finds it; that assumption is
checked on the way, and a field where it fails is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ValidationError

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.base import LARGEST_COUNT
from moeut_compose.spec.model import ModelSpec

Quantity = Literal["params", "macs", "active"]


class NoMatch(Exception):
    """No value of the free field comes close enough; the message says why."""


@dataclass(frozen=True)
class Match:
    """The closest value of the free fields."""

    name: str
    target_name: str
    by: Quantity
    values: dict[str, int]
    """Dotted path to the chosen integer."""
    target: int
    achieved: int
    next_best: int | None
    """What the second closest value would have given."""
    spec: ModelSpec

    @property
    def deviation(self) -> float:
        """Relative difference from the target."""
        return (self.achieved - self.target) / self.target

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["spec"]
        return fields | {"difference": self.achieved - self.target, "deviation": self.deviation}


def quantity(spec: ModelSpec, by: Quantity, seq_len: int | None = None) -> int:
    """Total parameters, exact multiply-accumulates per token, or parameters active per token."""
    match by:
        case "params":
            return count_params(spec).total
        case "macs":
            return count_macs(spec, seq_len).total_per_token
        case "active":
            return count_params(spec).active_per_token


def default_field(spec: ModelSpec) -> str:
    """The field that is varied unless told otherwise: the size of the first feedforward."""
    kind = spec.stages[0].layers[0].feedforward.kind
    return f"stages.0.layers.0.feedforward.{'d_ff' if kind == 'dense' else 'n_experts'}"


def match_spec(
    spec: ModelSpec,
    target: ModelSpec,
    *,
    by: Quantity,
    vary: Mapping[str, int] | None = None,
    seq_len: int | None = None,
    tolerance: float = 0.01,
) -> Match:
    """Choose integers so that `spec` comes closest to `target` in the quantity `by`.

    `vary` maps dotted paths to their share: with `{a: 1, b: 2}`, b is always twice a. `seq_len` (default: the
    target's context length) matters for multiply-accumulates only. Raises ValueError for a path that names no
    integer, `NoMatch` if no value comes within `tolerance` (relative) of the target.
    """
    fields = dict(vary or {default_field(spec): 1})
    length = target.context_length if seq_len is None else seq_len
    wanted = quantity(target, by, length)
    document = spec.model_dump(mode="json")
    for path in fields:
        _check_integer(document, path)
    search = _Search(spec, document, fields, lambda candidate: quantity(candidate, by, length))
    best = search.closest(wanted)
    achieved = search.at(best)
    assert achieved is not None
    neighbours = [value for step in (-1, 1) if (value := search.at(best + step)) is not None]
    result = Match(
        name=spec.name,
        target_name=target.name,
        by=by,
        values={path: share * best for path, share in fields.items()},
        target=wanted,
        achieved=achieved,
        next_best=min(neighbours, key=lambda value: abs(value - wanted), default=None),
        spec=search.spec(best),
    )
    if abs(result.deviation) > tolerance:
        chosen = ", ".join(f"{path}={value}" for path, value in result.values.items())
        raise NoMatch(
            f"{spec.name} cannot match {target.name} by {by}: the closest is {chosen} with {achieved:,} against "
            f"{wanted:,} ({result.deviation:+.2%}, more than {tolerance:.2%}){search.reason(best)}"
        )
    return result


class _Search:
    """The quantity as a function of one integer; None where the architecture is invalid."""

    def __init__(
        self,
        spec: ModelSpec,
        document: dict[str, Any],
        fields: Mapping[str, int],
        measure: Callable[[ModelSpec], int],
    ) -> None:
        self._document = document
        self._fields = fields
        self._measure = measure
        self._known: dict[int, int | None] = {}
        self._start = max(1, _read(document, next(iter(fields))) // next(iter(fields.values())))
        self._problems: dict[int, str] = {}

    def spec(self, value: int) -> ModelSpec:
        document = _copy(self._document)
        for path, share in self._fields.items():
            _write(document, path, share * value)
        return ModelSpec.model_validate(document)

    def at(self, value: int) -> int | None:
        if value not in self._known:
            self._known[value] = None
            if 1 <= value <= LARGEST_COUNT:
                try:
                    self._known[value] = self._measure(self.spec(value))
                except ValidationError as error:
                    self._problems[value] = error.errors()[0]["msg"].removeprefix("Value error, ")
        return self._known[value]

    def closest(self, wanted: int) -> int:
        """The valid value whose quantity is nearest to `wanted`; the smaller one of two equally near."""
        low, high = self._bracket(wanted)
        while high - low > 1:
            middle = (low + high) // 2
            here, left, right = self.at(middle), self.at(low), self.at(high)
            if here is None or left is None or right is None or not left <= here <= right:
                raise NoMatch(
                    f"{', '.join(self._fields)} does not change the count evenly; vary another field"
                )
            low, high = (middle, high) if here <= wanted else (low, middle)
        return min((low, high), key=lambda value: (abs((self.at(value) or 0) - wanted), value))

    def _bracket(self, wanted: int) -> tuple[int, int]:
        """Two valid values around the target, or the last valid one twice where validity ends before it."""
        start = self._start
        if self.at(start) is None:
            raise NoMatch(
                f"the architecture is invalid at its own value {start}: {self._problems.get(start, '')}"
            )
        grows = (self.at(start) or 0) <= wanted
        inside, step = start, 1
        while True:
            outside = inside + step if grows else max(inside - step, 0)
            value = self.at(outside)
            if value is None:
                edge = self._edge(inside, outside)
                if edge != start and self.at(edge) == self.at(start):
                    raise NoMatch(f"{', '.join(self._fields)} does not change the count; vary another field")
                return (inside, edge) if grows else (edge, inside)
            if (value >= wanted) if grows else (value <= wanted):
                return (inside, outside) if grows else (outside, inside)
            inside, step = outside, 2 * step

    def _edge(self, valid: int, invalid: int) -> int:
        """The last valid value on the way from a valid to an invalid one."""
        while abs(valid - invalid) > 1:
            middle = (valid + invalid) // 2
            valid, invalid = (valid, middle) if self.at(middle) is None else (middle, invalid)
        return valid

    def reason(self, value: int) -> str:
        for neighbour in (value - 1, value + 1):
            if neighbour in self._problems:
                return f"; {neighbour} is not possible: {self._problems[neighbour]}"
        return "; one step of the field changes the count by more than that"


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _parent(document: Any, path: str) -> tuple[Any, str | int]:
    *keys, last = path.split(".")
    node = document
    for key in keys:
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node, int(last) if isinstance(node, list) else last


def _read(document: dict[str, Any], path: str) -> int:
    node, key = _parent(document, path)
    return node[key]


def _write(document: dict[str, Any], path: str, value: int) -> None:
    node, key = _parent(document, path)
    node[key] = value


def _check_integer(document: dict[str, Any], path: str) -> None:
    try:
        value: Any = _read(document, path)
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"{path} is not a field of this architecture") from None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{path} is {value!r}, not an integer")
