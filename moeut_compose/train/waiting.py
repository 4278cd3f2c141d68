"""Experts that run several times get their gradients at the end of a stage, and rows of all uses wait until then."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from moeut_compose.blocks.stages import Stage
from moeut_compose.build import build_model

if TYPE_CHECKING:
    from moeut_compose.blocks.layers import Layer
    from moeut_compose.spec.model import ModelSpec


class Waiting(NamedTuple):
    """After each layer application of the backward pass, in its order: what is there, and what is not there yet."""

    rows: tuple[int, ...]
    """Bytes per token. Autograd turns to what was made first last, so all wait until the stage is through."""
    gradients: tuple[int, ...]
    """Bytes of gradients that are formed when the backward pass leaves the stage, of members that it has reached."""


def trace_waiting(spec: ModelSpec, dtype: torch.dtype) -> Waiting:
    """What waits under autocast to `dtype`."""
    rows, gradients = [], []
    for stage in reversed(build_model(spec, device="meta").stages):
        assert isinstance(stage, Stage)
        n_calls = Counter(member for member, _ in stage.schedule)
        layers = cast("list[Layer]", list(stage.layers))
        repeated = {member: layers[member] for member, n in n_calls.items() if n > 1}
        of_call = {member: _rows_of_call(layer, dtype) for member, layer in repeated.items()}
        experts = {m: _expert_gradients(layer) for m, layer in repeated.items() if of_call[m]}
        held, reached = 0, set()
        for member, _ in reversed(stage.schedule):
            held += of_call.get(member, 0)
            reached.add(member)
            rows.append(held)
            gradients.append(sum(experts.get(each, 0) for each in reached))
        gradients[-1] = 0
    return Waiting(tuple(rows), tuple(gradients))


def _expert_gradients(layer: Layer) -> int:
    return sum(4 * copy.numel() for copy in layer.copies(torch.float32).values())


def _rows_of_call(layer: Layer, dtype: torch.dtype) -> int:
    """Bytes of all rows that one application to one token hands in."""
    (tickets,) = layer.tickets(1, 1, layer.copies(dtype))
    rows = [part for ticket in tickets.values() for part in (ticket.left, ticket.right, ticket.slots)]
    return sum(part.numel() * part.element_size() for part in rows)
