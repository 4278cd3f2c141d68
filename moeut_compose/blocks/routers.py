"""Routers: score, select, weigh.

All of them compute scores in at least float32, choose with top-k (lowest index first among equals is not
promised) and return what their balance terms observed. Expert dropout hides experts before the choice and
rescales nothing. Routers that feedback steers instead of a gradient are in `steered_routers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import moeut_kernels as mk
import torch
from torch import Tensor, nn

from moeut_compose.blocks.balance import Balance, Observation
from moeut_compose.blocks.initialisation import keep_row_deviations_, normal_, uniform_
from moeut_compose.blocks.precision import at_least_float32
from moeut_compose.blocks.roles import Alive, Router, Routing
from moeut_compose.blocks.stats import Stats, below, under


class BalancedRouter(Router):
    """What every router here does around its scores: hide, rest, observe, turn pooled sums into losses."""

    def __init__(self, *, n_experts: int, expert_dropout: float, balance: Sequence[Balance]) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.expert_dropout = expert_dropout
        self.balance = tuple(balance)
        self.observes = bool(self.balance)

    def hide(self, scores: Tensor) -> Tensor:
        """Expert dropout: in training, the lowest score there is for each expert with some probability."""
        if not self.training or self.expert_dropout == 0:
            return scores
        return scores.masked_fill(
            torch.rand_like(scores) < self.expert_dropout, torch.finfo(scores.dtype).min
        )

    def routing(
        self, logits: Tensor, index: Tensor, gate: Tensor, alive: Alive | None, usage: Tensor | None = None
    ) -> Routing:
        """The choice and what balance terms make of it; tokens that rest weigh their experts with zero.

        usage: `[B, H, E]` sum of the softmax over all tokens, where it is known and no token rests.
        """
        if alive is not None:
            gate = gate.masked_fill(alive.rests[:, :, None, None], 0.0)
        if not (self.training and self.observes):
            return Routing(index, gate, {}, logits)
        if alive is not None:
            logits = logits.masked_fill(alive.rests[:, :, None, None], 0.0)
        seen = Observation(logits, index, gate, None if alive is None else alive.mass, usage)
        return Routing(index, gate, self.observe(seen), logits)

    def observe(self, seen: Observation) -> Stats:
        """Sums of all balance terms."""
        stats: Stats = {}
        for term in self.balance:
            stats |= under(term.name, term.observe(seen))
        return stats

    def losses(self, stats: Stats) -> dict[str, Tensor]:
        return {
            term.name: term.weight * term.loss(below(term.name, stats))
            for term in self.balance
            if any(name.startswith(f"{term.name}.") for name in stats)
        }


class LinearRouter(BalancedRouter):
    """Scores from one linear map; row `head * n_experts + expert` belongs to that pair."""

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        n_heads: int = 1,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(n_experts=n_experts, expert_dropout=expert_dropout, balance=balance)
        self.n_heads = n_heads
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_heads * n_experts, d_model))

    @property
    def n_choices(self) -> int:
        return self.top_k

    def reset_parameters(self, *, scale: float) -> None:
        normal_(self.weight, std=scale / math.sqrt(self.weight.shape[1]))

    def scores(self, x: Tensor) -> Tensor:
        """`[B, T, H, E']` of `x [B, T, D]`, in the dtype of the product; columns beyond E are padding."""
        columns = mk.padded_logits(x, self.weight.to(x.dtype))
        return columns.unsqueeze(-2) if self.n_heads == 1 else self.by_head(columns)

    def by_head(self, columns: Tensor) -> Tensor:
        """`[B, T, H, E]` of products `[B, T, >= H * E]` with the rows of the weight."""
        return columns[..., : self.weight.shape[0]].unflatten(-1, (self.n_heads, self.n_experts))

    def logits(self, x: Tensor) -> Tensor:
        """`[B, T, H, E]` of `x [B, T, D]`, in at least float32."""
        return at_least_float32(self.scores(x)[..., : self.n_experts])


class SigmoidRouter(LinearRouter):
    """Sigmoid, top-k, weights not normalised (sigma-MoE, arXiv:2310.10837; SwitchHead, arXiv:2312.07987).

    Where dropout leaves fewer than k experts, hidden ones are chosen too. In a feedforward they weigh
    nothing; in the published attention (`attention=True`) the weights are read off the scores as they were
    before. The rows of an attention router are drawn in the published way as well.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        n_heads: int = 1,
        attention: bool = False,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(
            d_model,
            n_experts=n_experts,
            top_k=top_k,
            n_heads=n_heads,
            expert_dropout=expert_dropout,
            balance=balance,
        )
        self.attention = attention

    def reset_parameters(self, *, scale: float) -> None:
        super().reset_parameters(scale=scale)
        if self.attention:
            keep_row_deviations_(self.weight)

    def forward(self, x: Tensor, alive: Alive | None, columns: Tensor | None = None) -> Routing:
        """Route `x [B, T, D]`, whose products with the rows of the weight may be known already: `columns`."""
        scores = self.scores(x) if columns is None else self.by_head(columns)
        logits = at_least_float32(scores[..., : self.n_experts])
        if self.training and self.expert_dropout:
            candidates = self.hide(logits)
            _, index = candidates.topk(self.top_k, dim=-1, sorted=False)
            gate = (logits if self.attention else candidates).gather(-1, index).sigmoid()
        elif self.training and self.observes and alive is None and columns is None:
            # Scores of a joint product keep the plain path: the compiler writes their gradient in its place.
            index, gate, usage = mk.topk_sigmoid_usage(scores, self.top_k, self.n_experts)
            return self.routing(logits, index, gate, alive, usage)
        else:
            index, gate = mk.topk_sigmoid(scores, self.top_k, self.n_experts)
        return self.routing(logits, index, gate, alive)


class SoftmaxRouter(LinearRouter):
    """Softmax over all experts before the choice, or over the chosen ones after it."""

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        after_top_k: bool,
        normalize: bool,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(
            d_model, n_experts=n_experts, top_k=top_k, expert_dropout=expert_dropout, balance=balance
        )
        self.after_top_k = after_top_k
        self.normalize = normalize

    def forward(self, x: Tensor, alive: Alive | None) -> Routing:
        logits = self.logits(x)
        candidates = self.hide(logits)
        chosen, index = candidates.topk(self.top_k, dim=-1, sorted=False)
        gate = chosen.softmax(-1) if self.after_top_k else candidates.softmax(-1).gather(-1, index)
        if self.normalize and not self.after_top_k:
            gate = gate / gate.sum(-1, keepdim=True)
        return self.routing(logits, index, gate, alive)


class MLPRouter(BalancedRouter):
    """Linear, tanh, linear, softmax, top-k, weights over their sum plus 1e-6 (SUT, arXiv:2310.07096).

    In training, `n_sampled` of the `top_k` experts are drawn without replacement in proportion to their
    probability, the others taken in order. Tokens that rest get probability and weight zero.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        n_sampled: int = 0,
        expert_dropout: float = 0.0,
        balance: Sequence[Balance] = (),
    ) -> None:
        super().__init__(n_experts=n_experts, expert_dropout=expert_dropout, balance=balance)
        self.top_k = top_k
        self.n_sampled = n_sampled
        self.inner = nn.Linear(d_model, d_model)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    @property
    def n_choices(self) -> int:
        return self.top_k

    def reset_parameters(self, *, scale: float) -> None:
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        for weight in (self.inner.weight, self.inner.bias, self.weight):
            uniform_(weight, bound=bound)

    def forward(self, x: Tensor, alive: Alive | None) -> Routing:
        hidden = torch.tanh(self.inner(x))
        logits = at_least_float32(hidden @ self.weight.t().to(hidden.dtype)).unsqueeze(-2)
        probability = self.hide(logits).softmax(-1)
        if alive is not None:
            probability = probability.masked_fill(alive.rests[:, :, None, None], 0.0)
        index = self._choose(probability)
        gate = probability.gather(-1, index)
        gate = gate / (gate.sum(-1, keepdim=True) + 1e-6)
        return self.routing(logits, index, gate, alive)

    def _choose(self, probability: Tensor) -> Tensor:
        n_sampled = self.n_sampled if self.training else 0
        _, index = probability.topk(self.top_k - n_sampled, dim=-1)
        if n_sampled == 0:
            return index
        rest = (probability.detach() + 1e-6).scatter(-1, index, 0.0)
        drawn = torch.multinomial(rest.flatten(0, -2), n_sampled).view(*rest.shape[:-1], n_sampled)
        return torch.cat((index, drawn), dim=-1)
