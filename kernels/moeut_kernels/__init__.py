"""Mixture-of-experts products for PyTorch: gather, multiply by chosen experts, gated sum; forward and backward.

Differentiable `torch.library` ops with a plain PyTorch definition that is fast on CPU and Triton kernels on CUDA.
"""

from moeut_kernels.activation import ACTIVATIONS
from moeut_kernels.backend import BACKENDS, backend, resolve, use_backend
from moeut_kernels.casting import cast_weights
from moeut_kernels.deferral import Ticket
from moeut_kernels.feedforward import expert_feedforward, feedforward_shares, feedforward_tickets
from moeut_kernels.norm import Carried, Fan, Shares, ShareShape, fans, norm_fan
from moeut_kernels.plan import Plan, plan
from moeut_kernels.projection import expert_merge, expert_split, projection_tickets, split_shares
from moeut_kernels.router import padded_logits, topk_sigmoid, topk_sigmoid_usage, topk_softmax

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Carried",
    "Fan",
    "Plan",
    "ShareShape",
    "Shares",
    "Ticket",
    "backend",
    "cast_weights",
    "expert_feedforward",
    "expert_merge",
    "expert_split",
    "fans",
    "feedforward_shares",
    "feedforward_tickets",
    "norm_fan",
    "padded_logits",
    "plan",
    "projection_tickets",
    "resolve",
    "split_shares",
    "topk_sigmoid",
    "topk_sigmoid_usage",
    "topk_softmax",
    "use_backend",
]
