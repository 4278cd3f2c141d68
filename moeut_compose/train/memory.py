"""How much memory a training step needs, estimated before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import saved_tensors_hooks

from moeut_compose.blocks.cross_entropy import CHUNK
from moeut_compose.build import build_model

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.device import PrecisionName

_MIXED_SHARE = 0.65
"""Of the float32 activations, what remains when products save 16-bit inputs and norms keep float32 ones."""
_MARGIN = 1.15
"""Room for temporaries and fragmentation."""
_USABLE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that a run may plan with."""
_CPU_TOKENS = 4096
"""Larger micro-batches do not run faster on a CPU."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; activations are those of one micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass, and what both need besides."""

    fixed: int
    per_sequence: int

    def of(self, micro_batch: int) -> int:
        return self.fixed + self.per_sequence * micro_batch


def trace_activations(spec: ModelSpec, context: int, precision: PrecisionName) -> Activations:
    """What a training step keeps, traced on the meta device, where nothing is allocated."""
    model = build_model(spec, device="meta").train()
    one, two = (_kept_bytes(model, spec, batch_size, context) for batch_size in (1, 2))
    share = _MARGIN * (1.0 if precision == "fp32" else _MIXED_SHARE)
    logits = 3 * 4 * CHUNK * spec.vocab_size
    return Activations(fixed=max(0, 2 * one - two) + logits, per_sequence=round(share * (two - one)))


def _kept_bytes(model: LanguageModel, spec: ModelSpec, batch_size: int, context: int) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    ids = torch.zeros(batch_size, context, dtype=torch.long, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, targets=ids)
    is_fused = all(member.position.kind != "relative" for member in spec.members())
    held = [tensor for tensor in kept.values() if not (is_fused and _is_attention_map(tensor, context))]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _is_attention_map(tensor: Tensor, context: int) -> bool:
    """Attention probabilities, which the meta device keeps and fused attention does not."""
    return tensor.ndim == 4 and tensor.shape[-2:] == (context, context) and tensor.is_floating_point()


def estimate_memory(
    n_params: int, activations: Activations, micro_batch: int, precision: PrecisionName
) -> MemoryEstimate:
    """Memory of a training step with float32 weights, gradients and two AdamW moments."""
    copies = 0 if precision == "fp32" else 2 * n_params
    return MemoryEstimate(
        weights=4 * n_params + copies,
        gradients=4 * n_params,
        optimizer=8 * n_params,
        activations=activations.of(micro_batch),
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

    On a CPU also no more than some thousand tokens, because more would only cost memory.
    """
    limit = batch_size
    if device.type == "cpu":
        limit = min(limit, max(1, _CPU_TOKENS // context))
    if free is not None:
        room = free * _USABLE.get(device.type, 0.9) - 18 * n_params - activations.fixed
        limit = min(limit, max(1, int(room // activations.per_sequence)))
    divisor = max(size for size in range(1, limit + 1) if batch_size % size == 0)
    n_parts = -(-batch_size // limit)
    return divisor if 2 * divisor > limit else -(-batch_size // n_parts)
