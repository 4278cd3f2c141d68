"""How much memory a training step needs at its peak, worked out before anything is allocated.

The peak lies in the backward pass, near its beginning: weights, optimiser state, everything that the forward pass kept,
and what one layer's backward needs besides. `kept.py` says what that is, `workspace.py` what comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from moeut_compose.spec.stages import schedule
from moeut_compose.train.kept import trace_kept
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
    by_mode: Mapping[ActivationCheckpointing, Activations] = field(default_factory=dict)
    """The same with activation checkpointing: layer applications keep little, and one after the other runs again."""

    def checkpointed(self, mode: ActivationCheckpointing) -> Activations:
        """These activations with activation checkpointing, where it was traced."""
        return self.by_mode.get(mode, self)

    def of(self, micro_batch: int) -> int:
        return self.fixed + self.per_sequence * micro_batch

    def peak(self, micro_batch: int) -> int:
        """The most that activations and gradients take together in one backward pass that finds no gradients."""
        whole, depth = self.per_sequence * micro_batch, len(self.gradients)
        if not depth:
            return self.fixed + whole
        moments = [
            whole * (depth - done) // depth + present
            for done, present in enumerate((0, *self.gradients[:-1]))
        ]
        return self.fixed + max(moments)


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

    def with_workspace(part: Kept, **by_mode: Any) -> Activations:
        return Activations(part.fixed + largest, part.per_sequence + workspace, gradients, **by_mode)

    by_mode = {mode: with_workspace(part) for mode, part in kept.checkpointed.items()}
    return with_workspace(kept, by_mode=by_mode)


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
    during = activations.of(micro_batch) + gradients if accumulates else activations.peak(micro_batch)
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
        limit = min(limit, max(1, int(room // activations.per_sequence)))
    divisor = max(size for size in range(1, limit + 1) if batch_size % size == 0)
    n_parts = -(-batch_size // limit)
    return divisor if 2 * divisor > limit else -(-batch_size // n_parts)
