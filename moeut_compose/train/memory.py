"""How much memory a training step needs at its peak, worked out before anything is allocated.

The peak lies in the backward pass: at its beginning, when everything is there that the forward pass kept, or at the end
of a stage that repeats, when rows of all uses wait for the gradients of its experts. `kept.py` says what is kept,
`waiting.py` what waits, `workspace.py` what one layer's backward needs besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from moeut_compose.spec.stages import schedule
from moeut_compose.train.kept import DTYPES, trace_kept
from moeut_compose.train.waiting import Waiting, trace_waiting
from moeut_compose.train.workspace import backward_workspace, loss_workspace

if TYPE_CHECKING:
    import torch

    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.device import PrecisionName
    from moeut_compose.train.kept import Kept
    from moeut_compose.train.recompute import ActivationCheckpointing

_USABLE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that a run may plan with; the rest is for fragments and for what is estimated too low."""
_CPU_TOKENS = 4096
"""Larger micro-batches do not run faster on a CPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; activations are those of one micro-batch, copies of weights and workspace included."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    """The most that is held at once: gradients come while activations go."""

    @property
    def total(self) -> int:
        """What the device must have room for."""
        return self.peak

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Activations:
    """Bytes besides weights, gradients and optimiser state: `fixed` once, `per_sequence` for every sequence."""

    fixed: int
    per_sequence: int
    gradients: tuple[int, ...] = ()
    """Bytes of the gradients that exist after each backward pass through a layer application, in backward order."""
    workspace: int = 0
    """The part of `per_sequence` that every layer application takes for a moment."""
    waiting: tuple[int, ...] = ()
    """Bytes for every sequence that wait after each layer application, in backward order; empty: nothing does."""
    by_mode: Mapping[ActivationCheckpointing, Activations] = field(default_factory=dict)
    """The same with activation checkpointing: layer applications keep little, and one after the other runs again."""

    def checkpointed(self, mode: ActivationCheckpointing) -> Activations:
        """These activations with activation checkpointing, where it was traced."""
        return self.by_mode.get(mode, self)

    def of(self, micro_batch: int) -> int:
        return self.fixed + self.per_sequence * micro_batch

    def moments(self) -> list[int]:
        """Bytes for every sequence: when none, one, two ... and when all applications are through."""
        depth, kept = max(len(self.gradients), 1), self.per_sequence - self.workspace
        waiting = (0, *(self.waiting or (0,) * depth))
        during = [kept * (depth - done) // depth + self.workspace + waiting[done] for done in range(depth)]
        return [*during, waiting[depth]]

    def largest(self, micro_batch: int) -> int:
        """The most that they take in a backward pass, whatever gradients there are."""
        return self.fixed + max(self.moments()) * micro_batch

    def peak(self, micro_batch: int) -> int:
        """The most that activations and gradients take together in one backward pass that finds no gradients."""
        gradients = (0, *self.gradients) if self.gradients else (0, 0)
        moments = zip(self.moments(), gradients, strict=True)
        return self.fixed + max(moment * micro_batch + present for moment, present in moments)


def trace_activations(
    spec: ModelSpec,
    context: int,
    precision: PrecisionName,
    *,
    device_type: str = "cpu",
    compiled: bool = False,
) -> Activations:
    """What a training step keeps, traced on tensors without memory, and what the backward of one layer allocates."""
    kept = trace_kept(spec, context, precision, device_type=device_type, compiled=compiled)
    element = 4 if precision == "fp32" else 2
    gradients, largest = _gradient_growth(spec)
    workspace = context * backward_workspace(spec, context, element, device_type=device_type)
    largest = max(largest, loss_workspace(spec, element, compiled=compiled))

    nothing = Waiting(rows=(0,) * spec.depth, gradients=(0,) * spec.depth)
    dtype = DTYPES.get(precision)
    deferred = nothing if dtype is None else trace_waiting(spec, dtype)

    def together(part: Kept, waiting: Waiting, **by_mode: Any) -> Activations:
        return Activations(
            fixed=part.fixed + largest,
            per_sequence=part.per_sequence + workspace,
            gradients=tuple(all_ - later for all_, later in zip(gradients, waiting.gradients, strict=True)),
            workspace=workspace,
            waiting=tuple(context * rows for rows in waiting.rows),
            **by_mode,
        )

    by_mode = {
        mode: together(part, nothing if mode == "full" else deferred)
        for mode, part in kept.checkpointed.items()
    }
    return together(kept, deferred, by_mode=by_mode)


def _gradient_growth(spec: ModelSpec) -> tuple[tuple[int, ...], int]:
    """Gradient bytes after each layer application of the backward pass, and those of the largest layer.

    A shared layer's gradient comes into being at its last application; earlier ones add to it.
    """
    sizes = {(member.stage, member.index): 4 * member.num_params(spec.d_model) for member in spec.members()}
    seen: set[tuple[int, int]] = set()
    growth, present = [], 4 * spec.head_params()
    for step in reversed(schedule(spec.stages)):
        if (step.stage, step.member) not in seen:
            seen.add((step.stage, step.member))
            present += sizes[step.stage, step.member]
        growth.append(present)
    return tuple(growth), max(sizes.values())


def estimate_memory(
    n_params: int, activations: Activations, micro_batch: int, *, accumulates: bool = False
) -> MemoryEstimate:
    """Memory of a training step with float32 weights, gradients and two AdamW moments.

    `accumulates`: gradients of an earlier micro-batch are there during the whole pass.
    """
    weights, gradients, optimizer = 4 * n_params, 4 * n_params, 8 * n_params
    during = activations.largest(micro_batch) + gradients if accumulates else activations.peak(micro_batch)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations.of(micro_batch),
        peak=weights + optimizer + max(during, gradients),
    )


def choose_micro_batch(
    batch_size: int,
    *,
    activations: Activations,
    n_params: int,
    context: int,
    device: torch.device,
    free: int | None,
) -> int:
    """The largest part of a batch that fits into the memory of a device, a divisor of it where one is near.

    All gradients are counted in full, as they are when parts add up. On a CPU also no more than some thousand tokens,
    because more would only cost memory.
    """
    limit = batch_size
    if device.type == "cpu":
        limit = min(limit, max(1, _CPU_TOKENS // context))
    if free is not None:
        room = free * _USABLE.get(device.type, 0.9) - 16 * n_params - activations.fixed
        limit = min(limit, max(1, int(room // max(activations.moments()))))
    divisor = max(size for size in range(1, limit + 1) if batch_size % size == 0)
    n_parts = -(-batch_size // limit)
    return divisor if 2 * divisor > limit else -(-batch_size // n_parts)
