"""What a backward pass allocates for a moment and gives back: the largest layer's worth is part of the peak."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from moeut_compose.blocks.cross_entropy import CHUNK
from moeut_compose.spec.feedforwards import DenseSpec, MoESpec, SigmaMoESpec
from moeut_compose.spec.mixers import AttentionSpec, MixtureOfAttentionSpec, SwitchHeadSpec

if TYPE_CHECKING:
    from moeut_compose.spec.feedforwards import FeedForwardSpec
    from moeut_compose.spec.mixers import MixerSpec
    from moeut_compose.spec.model import ModelSpec

_RESIDUAL_GRADIENTS = 2
"""Float32 gradients of the residual stream: of a layer's output, and of its input."""


def backward_workspace(spec: ModelSpec, context: int, element: int, *, device_type: str) -> int:
    """Bytes per token of the layer that needs most; `element` is the size of what products read and write."""
    d_model = spec.d_model
    # rows of the model width for every slot: what is summed, and without Triton gathered inputs and gradients too
    rows = 1 if device_type == "cuda" else 3
    needs = []
    for member in spec.members():
        mixer = _mixer(member.layer.mixer, d_model, rows)
        if member.position.kind == "relative":
            mixer += 2 * _n_query_heads(member.layer.mixer) * context
        needs.append(max(mixer, _feedforward(member.layer.feedforward, d_model, rows)))
    return element * max(needs) + 4 * _RESIDUAL_GRADIENTS * d_model


def loss_workspace(spec: ModelSpec, element: int, *, compiled: bool) -> int:
    """Bytes of the head's loss: logits of a chunk and their gradient; uncompiled also three float32 steps between."""
    return CHUNK * spec.vocab_size * (2 * element if compiled else 2 * element + 3 * 4)


def _feedforward(spec: FeedForwardSpec, d_model: int, rows: int) -> int:
    match spec:
        case DenseSpec():
            return 2 * spec.linear_shapes(d_model)[0][1]
        case SigmaMoESpec():
            return spec.top_k * (rows * d_model + _up(spec))
        case MoESpec():
            shared = 2 * spec.linear_shapes(d_model)[0][1] if spec.n_shared else 0
            return max(shared, spec.n_slots * (rows * d_model + _up(spec)))
        case _:
            assert_never(spec)


def _up(spec: SigmaMoESpec | MoESpec) -> int:
    return spec.d_expert * (2 if spec.activation == "swiglu" else 1)


def _mixer(spec: MixerSpec, d_model: int, rows: int) -> int:
    inner = 4 * _n_query_heads(spec) * spec.d_head
    match spec:
        case AttentionSpec():
            return inner
        case SwitchHeadSpec():
            # pairs are added up where they are made; the row that is left for each head is less than experts need
            in_pairs = spec.top_k == 2 and rows == 1
            return inner + (0 if in_pairs else spec.n_heads * spec.top_k * rows * d_model)
        case MixtureOfAttentionSpec():
            return inner + spec.n_active * rows * d_model
        case _:
            assert_never(spec)


def _n_query_heads(spec: MixerSpec) -> int:
    return spec.n_heads * spec.n_active if isinstance(spec, MixtureOfAttentionSpec) else spec.n_heads
