"""The layers that are timed: operands, forward and backward, and the same in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

import moeut_kernels as mk


@dataclass(frozen=True)
class FeedforwardShape:
    """A sigma-MoE feedforward layer."""

    name: str
    n_tokens: int
    d_model: int
    n_experts: int
    d_expert: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of one product, 2 x MACs: a layer has two forward and four backward."""
        return 2 * self.n_tokens * self.top_k * self.d_model * self.d_expert


@dataclass(frozen=True)
class AttentionShape:
    """Value and output projections of a SwitchHead layer, two active experts a head."""

    name: str
    n_tokens: int
    d_model: int
    n_heads: int
    d_head: int
    n_experts: int

    @property
    def flops(self) -> int:
        return 2 * self.n_tokens * self.n_heads * 2 * self.d_model * self.d_head


FEEDFORWARDS = (
    FeedforwardShape("244m", 8192, 1024, 387, 128, 16),
    FeedforwardShape("244m", 32768, 1024, 387, 128, 16),
    FeedforwardShape("1b", 32768, 1536, 565, 128, 24),
)
ATTENTIONS = (AttentionShape("244m", 8192, 1024, 4, 128, 10), AttentionShape("244m", 32768, 1024, 4, 128, 10))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expectation."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


class Feedforward:
    """Operands of a feedforward layer, and its forward and backward."""

    def __init__(
        self, shape: FeedforwardShape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        n, d, e, f, k = shape.n_tokens, shape.d_model, shape.n_experts, shape.d_expert, shape.top_k
        rows = {"device": device, "dtype": dtype}
        self.shape = shape
        self.index = torch.rand(n, 1, e, device=device).topk(k, -1)[1]
        self.x = torch.randn(n, d, **rows).requires_grad_()
        self.gate = (torch.rand(n, 1, k, device=device) * 0.9 + 0.05).requires_grad_()
        self.w_up = (torch.randn(e, d, f, device=device) / d**0.5).requires_grad_()
        self.w_down = (torch.randn(e, f, d, device=device) / (f * k) ** 0.5).requires_grad_()
        self.casts = mk.cast_weights(self.w_up, self.w_down, dtype=dtype)
        self.grad = torch.randn(n, d, **rows)

    def forward(self) -> Tensor:
        plan = mk.plan(self.index, self.shape.n_experts)
        return mk.expert_feedforward(self.x, self.w_up, self.w_down, plan, self.gate, casts=self.casts)

    def both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return out, *torch.autograd.grad(out, (self.x, self.gate, self.w_up, self.w_down), self.grad)

    def exact(self) -> tuple[Tensor, ...]:
        """The layer in float64, one expert after the other, from the same rounded operands."""
        x, gate = (t.detach().double().requires_grad_() for t in (self.x, self.gate))
        w_up, w_down = (t.double().requires_grad_() for t in self.casts)
        out = torch.zeros_like(x)
        for expert in range(self.shape.n_experts):
            token, choice = (self.index[:, 0] == expert).nonzero(as_tuple=True)
            hidden = torch.relu(x[token] @ w_up[expert])
            out = out.index_add(0, token, (hidden @ w_down[expert]) * gate[token, 0, choice, None])
        return out, *torch.autograd.grad(out, (x, gate, w_up, w_down), self.grad.double())


class Attention:
    """Operands of SwitchHead's value and output projections, with a routing of each."""

    def __init__(
        self, shape: AttentionShape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        n, d, h, f = shape.n_tokens, shape.d_model, shape.n_heads, shape.d_head
        rows = {"device": device, "dtype": dtype}
        self.shape, self.n_experts = shape, h * shape.n_experts
        first = torch.arange(h, device=device)[:, None] * shape.n_experts
        self.indices = [
            torch.rand(n, h, shape.n_experts, device=device).topk(2, -1)[1] + first for _ in range(2)
        ]
        self.gates = [(torch.rand(n, h, 2, device=device) * 0.9 + 0.05).requires_grad_() for _ in range(2)]
        self.x = torch.randn(n, d, **rows).requires_grad_()
        self.mixed = torch.randn(n, h, f, **rows).requires_grad_()
        self.values = (torch.randn(self.n_experts, d, f, device=device) / d**0.5).requires_grad_()
        self.outputs = (
            torch.randn(self.n_experts, f, d, device=device) / (f * h * 2) ** 0.5
        ).requires_grad_()
        self.casts = mk.cast_weights(self.values, self.outputs, dtype=dtype)
        self.grads = (torch.randn(n, h, f, **rows), torch.randn(n, d, **rows))

    def forward(self) -> tuple[Tensor, Tensor]:
        plans = [mk.plan(index, self.n_experts, disjoint=True) for index in self.indices]
        values = mk.expert_split(self.x, self.values, plans[0], self.gates[0], cast=self.casts[0])
        outputs = mk.expert_merge(self.mixed, self.outputs, plans[1], self.gates[1], cast=self.casts[1])
        return values, outputs

    def both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        leaves = (self.x, self.mixed, *self.gates, self.values, self.outputs)
        return *out, *torch.autograd.grad(out, leaves, self.grads)

    def exact(self) -> tuple[Tensor, ...]:
        """Both projections in float64, one expert after the other, from the same rounded operands."""
        x, mixed, *gates = (t.detach().double().requires_grad_() for t in (self.x, self.mixed, *self.gates))
        weights = [t.double().requires_grad_() for t in self.casts]
        n_tokens, n_heads, d_head = self.mixed.shape
        values, outputs = x.new_zeros(n_tokens * n_heads, d_head), torch.zeros_like(x)
        for expert in range(self.n_experts):
            token, head, choice = (self.indices[0] == expert).nonzero(as_tuple=True)
            term = (x[token] @ weights[0][expert]) * gates[0][token, head, choice, None]
            values = values.index_add(0, token * n_heads + head, term)
            token, head, choice = (self.indices[1] == expert).nonzero(as_tuple=True)
            term = (mixed[token, head] @ weights[1][expert]) * gates[1][token, head, choice, None]
            outputs = outputs.index_add(0, token, term)
        out = (values.view(n_tokens, n_heads, d_head), outputs)
        leaves = (x, mixed, *gates, *weights)
        return *out, *torch.autograd.grad(out, leaves, tuple(g.double() for g in self.grads))
