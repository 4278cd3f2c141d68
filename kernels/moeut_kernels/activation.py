"""Activations of expert feedforwards and their derivatives, in plain PyTorch.

Gated activations read twice the expert width: `act(first half) · second half`.
"""

import math

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "geglu")
"""gelu is the exact one (erf). swiglu = silu(a)·b, geglu = gelu(a)·b with a, b the halves of the up projection."""

_GATED = {"swiglu": "silu", "geglu": "gelu"}


def is_gated(activation: str) -> bool:
    """Whether the up projection is twice as wide as the hidden."""
    return activation in _GATED


def apply(activation: str, z: Tensor) -> Tensor:
    """Hidden of pre-activation `z`: [S, F], or [S, 2F] for gated ones."""
    if is_gated(activation):
        gate, value = z.chunk(2, -1)
        return apply(_GATED[activation], gate) * value
    match activation:
        case "relu":
            return torch.relu(z)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case "silu":
            return torch.nn.functional.silu(z)
    raise AssertionError(activation)


def backward(activation: str, z: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the pre-activation. For relu `z` may be the hidden itself: only its sign is read."""
    if is_gated(activation):
        gate, value = z.chunk(2, -1)
        inner = _GATED[activation]
        return torch.cat([backward(inner, gate, grad * value), grad * apply(inner, gate)], -1)
    match activation:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, z, 0)
        case "gelu":
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return grad * (0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density)
        case "silu":
            sigmoid = torch.sigmoid(z)
            return grad * sigmoid * (1 + z * (1 - sigmoid))
    raise AssertionError(activation)
