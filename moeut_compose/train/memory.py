"""How much memory a training step needs, estimated before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import saved_tensors_hooks

from moeut_compose.build import build_model

if TYPE_CHECKING:
    from torch import Tensor

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


def activation_bytes(spec: ModelSpec, context: int, precision: PrecisionName) -> int:
    """Bytes that one training sequence keeps for its backward pass, traced without allocating anything."""
    model = build_model(spec, device="meta").train()
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[int, Tensor] = {}
    is_fused = all(member.position.kind != "relative" for member in spec.members())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, targets=ids)
    held = [tensor for tensor in kept.values() if not (is_fused and _is_attention_map(tensor, context))]
    saved = sum(tensor.untyped_storage().nbytes() for tensor in held)
    logits = 2 * 4 * context * spec.vocab_size
    return round(_MARGIN * (logits + saved * (1.0 if precision == "fp32" else _MIXED_SHARE)))


def _is_attention_map(tensor: Tensor, context: int) -> bool:
    """Attention probabilities, which the meta device keeps and fused attention does not."""
    return tensor.ndim == 4 and tensor.shape[-2:] == (context, context) and tensor.is_floating_point()


def estimate_memory(
    n_params: int, per_sequence: int, micro_batch: int, precision: PrecisionName
) -> MemoryEstimate:
    """Memory of a training step with float32 weights, gradients and two AdamW moments."""
    copies = 0 if precision == "fp32" else 2 * n_params
    return MemoryEstimate(
        weights=4 * n_params + copies,
        gradients=4 * n_params,
        optimizer=8 * n_params,
        activations=micro_batch * per_sequence,
    )


def choose_micro_batch(
    batch_size: int, *, per_sequence: int, n_params: int, context: int, device: torch.device, free: int | None
) -> int:
    """The largest even share of a batch that fits into the memory of a device.

    On a CPU also no more than some thousand tokens, because more would only cost memory.
    """
    limit = batch_size
    if device.type == "cpu":
        limit = min(limit, max(1, _CPU_TOKENS // context))
    if free is not None:
        room = free * _USABLE.get(device.type, 0.9) - 18 * n_params
        limit = min(limit, max(1, int(room // per_sequence)))
    n_parts = -(-batch_size // limit)
    return -(-batch_size // n_parts)
