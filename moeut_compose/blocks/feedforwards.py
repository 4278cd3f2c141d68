"""Feedforwards: dense, and experts behind a router."""

from __future__ import annotations

import math
from typing import Literal

import moeut_kernels as mk
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeut_compose.blocks.initialisation import normal_, truncated_normal_, uniform_
from moeut_compose.blocks.linear import Linear, Lora
from moeut_compose.blocks.roles import Call, Copies, FeedForward, Router, Tickets, everyone, running
from moeut_compose.blocks.stats import Stats, under

Activation = Literal["relu", "gelu", "silu", "swiglu"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation; `swiglu` takes `[..., 2F]` (gate half first) to `[..., F]`."""
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "silu":
            return F.silu(x)
        case "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value


def up_width(width: int, activation: Activation) -> int:
    """Columns of the up projection: a gated activation needs two for every hidden channel."""
    return 2 * width if activation == "swiglu" else width


class DenseFeedForward(FeedForward):
    """Two linear maps with an activation between them."""

    def __init__(
        self, d_model: int, *, d_ff: int, activation: Activation, bias: bool, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = Linear(d_model, up_width(d_ff, activation), bias=bias, lora=lora)
        self.down = Linear(d_ff, d_model, bias=bias, lora=lora)

    def reset_parameters(self, *, scale: float) -> None:
        for linear in (self.up, self.down):
            truncated_normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            linear.reset_lora()

    def forward(
        self, data: Tensor, select: Tensor, call: Call, residual: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        hidden = activate(self.up(data, call.repeat), self.activation)
        output = self.down(hidden, call.repeat)
        return output if residual is None else residual + output, {}


class ExpertFeedForward(FeedForward):
    """The gated sum over each token's chosen experts, plus experts that every token uses.

    `up [E, D, F]` and `down [E, F, D]`; biases, where there are any, are gated with their expert. The weight
    of `shared` experts is one.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_expert: int,
        router: Router,
        activation: Activation,
        bias: bool,
        n_shared: int = 0,
        uniform_fan_in: bool = False,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        n_experts, width = router.n_experts, up_width(d_expert, activation)
        self.activation: Activation = activation
        self.uniform_fan_in = uniform_fan_in
        self.router = router
        self.up = nn.Parameter(torch.empty(n_experts, d_model, width))
        self.down = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.up_bias = nn.Parameter(torch.empty(n_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(n_experts, d_model)) if bias else None
        self.shared = (
            DenseFeedForward(d_model, d_ff=n_shared * d_expert, activation=activation, bias=bias, lora=lora)
            if n_shared
            else None
        )

    def reset_parameters(self, *, scale: float) -> None:
        n_experts, d_expert, d_model = self.down.shape
        if self.uniform_fan_in:
            uniform_(self.up, bound=1.0 / d_model)
            uniform_(self.down, bound=1.0 / d_expert)
        else:
            normal_(self.up, std=scale / math.sqrt(d_model))
            normal_(self.down, std=scale / math.sqrt(n_experts * d_expert))
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                uniform_(bias, bound=1.0 / math.sqrt(bias.shape[1]))
        self.router.reset_parameters(scale=scale)
        if self.shared is not None:
            self.shared.reset_parameters(scale=scale)

    def expert_weights(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    @property
    def takes_padded(self) -> bool:
        return self.up_bias is None and up_width(1, self.activation) == 1

    def tickets(self, n_calls: int, n_tokens: int, copies: Copies) -> list[Tickets]:
        casts, top_k = (copies["up"], copies["down"]), self.router.n_choices
        pairs = mk.feedforward_tickets(
            self.up, self.down, n_calls, casts=casts, n_tokens=n_tokens, top_k=top_k
        )
        return [{"up": up, "down": down} for up, down in pairs]

    def shares(self, data: Tensor, copies: Copies | None) -> mk.ShareShape | None:
        up = self.up if copies is None else copies["up"]
        return mk.feedforward_shares(data, up, self.router.n_choices)

    def forward(
        self, data: Tensor, select: Tensor, call: Call, residual: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        alive, up, down = call.alive, call.copy_of("up"), call.copy_of("down")
        up_ticket, down_ticket = call.ticket_of("up"), call.ticket_of("down")
        routing = self.router(select, alive)
        index, gate, rows = (
            running(part.flatten(0, 1), alive) for part in (routing.index, routing.gate, data)
        )
        output = mk.expert_feedforward(
            rows,
            self.up,
            self.down,
            mk.plan(index, self.router.n_experts),
            gate,
            activation=self.activation,
            b_up=self.up_bias,
            b_down=self.down_bias,
            casts=None if up is None or down is None else (up, down),
            tickets=None if up_ticket is None or down_ticket is None else (up_ticket, down_ticket),
            residual=None if residual is None or alive is not None else residual.flatten(0, 1),
            shares=call.shares,
        )
        output = everyone(output, alive).view(data.shape)
        if residual is not None and alive is not None:
            output = residual + output
        if self.shared is not None:
            output = output + self.shared(data, select, call)[0]
        return output, under("router", routing.stats)
