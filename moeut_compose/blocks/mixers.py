"""Sequence mixers: dense attention, SwitchHead, mixture of attention."""

from __future__ import annotations

import math

import moeut_kernels as mk
import torch
from torch import Tensor, nn

from moeut_compose.blocks.attention import attend, remember, rotated_heads, split_heads
from moeut_compose.blocks.cache import Memory
from moeut_compose.blocks.initialisation import normal_, truncated_normal_, uniform_, xavier_uniform_
from moeut_compose.blocks.linear import Linear, Lora, joint_linear
from moeut_compose.blocks.roles import (
    Alive,
    Call,
    Copies,
    Mixed,
    Mixer,
    Position,
    Router,
    Routing,
    Tickets,
    everyone,
    running,
)
from moeut_compose.blocks.routers import SigmoidRouter
from moeut_compose.blocks.stats import Stats, under


class Attention(Mixer):
    """Softmax attention with dense projections and no biases."""

    def __init__(
        self, d_model: int, *, n_heads: int, d_head: int, position: Position, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = Linear(d_model, n_heads * d_head, bias=False, lora=lora)
        self.key = Linear(d_model, n_heads * d_head, bias=False, lora=lora)
        self.value = Linear(d_model, n_heads * d_head, bias=False, lora=lora)
        self.output = Linear(n_heads * d_head, d_model, bias=False, lora=lora)
        self.position = position

    def reset_parameters(self, *, scale: float) -> None:
        for linear in (self.query, self.output):
            truncated_normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
        rows = self.key.weight.shape[0]
        joint = torch.cat((self.key.weight, self.value.weight))
        truncated_normal_(joint, std=scale / math.sqrt(self.key.in_features))
        with torch.no_grad():
            self.key.weight.copy_(joint[:rows])
            self.value.weight.copy_(joint[rows:])
        for linear in (self.query, self.key, self.value, self.output):
            linear.reset_lora()
        self.position.reset_parameters()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, past: Memory | None) -> Mixed:
        q = rotated_heads(
            self.query(query, call.repeat), self.n_heads, position=self.position, start=call.start
        )
        k = rotated_heads(self.key(key, call.repeat), self.n_heads, position=self.position, start=call.start)
        v = split_heads(self.value(value, call.repeat), self.n_heads)
        memory = remember(k, v, past, call.start)
        mixed = attend(q, memory, position=self.position, start=call.start)
        return Mixed(
            self.output(mixed.transpose(1, 2).flatten(2), call.repeat), {}, memory if call.remember else None
        )


class SwitchHead(Mixer):
    """Attention whose value and output projections are experts, chosen per head (arXiv:2312.07987).

    Expert tensors are indexed `head * n_experts + expert`. The value gate belongs to the source token, the
    output gate to the destination token; neither is normalised.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        d_head: int,
        value_router: Router | None,
        output_router: Router,
        position: Position,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_experts = output_router.n_experts
        self.query = Linear(d_model, n_heads * d_head, bias=False, lora=lora)
        self.key = Linear(d_model, n_heads * d_head, bias=False, lora=lora)
        self.value = nn.Parameter(torch.empty(n_heads * self.n_experts, d_model, d_head))
        self.output = nn.Parameter(torch.empty(n_heads * self.n_experts, d_head, d_model))
        self.value_router = value_router
        self.output_router = output_router
        self.position = position

    def reset_parameters(self, *, scale: float) -> None:
        d_model, d_head = self.value.shape[1:]
        for weight in (self.query.weight, self.key.weight, self.value):
            normal_(weight, std=scale / math.sqrt(d_model))
        normal_(self.output, std=scale / math.sqrt(self.n_heads * d_head))
        if self.value_router is not None:
            self.value_router.reset_parameters(scale=scale)
        self.output_router.reset_parameters(scale=scale)
        for linear in (self.query, self.key):
            linear.reset_lora()
        self.position.reset_parameters()

    def expert_weights(self) -> dict[str, Tensor]:
        return {} if self.n_experts == 1 else {"value": self.value, "output": self.output}

    @property
    def takes_padded(self) -> bool:
        return True

    def tickets(self, n_calls: int, n_tokens: int, copies: Copies) -> list[Tickets]:
        tickets: list[Tickets] = [{} for _ in range(n_calls)]
        routers = {"value": self.value_router, "output": self.output_router}
        for name, weight in self.expert_weights().items():
            router = routers[name]
            if router is None:
                continue
            of_weight = mk.projection_tickets(
                weight,
                n_calls,
                merge=name == "output",
                cast=copies[name],
                n_tokens=n_tokens,
                n_groups=self.n_heads,
                top_k=router.n_choices,
            )
            for of_call, ticket in zip(tickets, of_weight, strict=True):
                of_call[name] = ticket
        return tickets

    def shares(self, value: Tensor, copies: Copies | None) -> mk.ShareShape | None:
        if self.value_router is None or self.n_experts == 1:
            return None
        return mk.split_shares(value, self.value if copies is None else copies["value"], self.n_heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, past: Memory | None) -> Mixed:
        products = self._joint_products(query) if query is key else None
        if products is None:
            products = self.query(query, call.repeat), self.key(key, call.repeat), {}
        q, k, known = products
        q, k = (rotated_heads(x, self.n_heads, position=self.position, start=call.start) for x in (q, k))
        v, stats = self._values(key, value, call, known.get("value"))
        memory = remember(k, v, past, call.start)
        mixed = attend(q, memory, position=self.position, start=call.start)
        output, output_stats = self._outputs(query, mixed, call, known.get("output"))
        return Mixed(output, stats | output_stats, memory if call.remember else None)

    def _joint_products(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """Queries, keys and what the routers make their scores of, in one product; None where that does not pay."""
        routers = {"value": self.value_router, "output": self.output_router}
        plain = {name: router.weight for name, router in routers.items() if type(router) is SigmoidRouter}
        if len(plain) < 2 or self.query.lora_down is not None or x.is_meta or not torch.is_grad_enabled():
            return None
        q, k, *scores = joint_linear(x, self.query.weight, self.key.weight, *plain.values())
        # copies: views that the backward keeps would keep the whole product
        return q, k, {name: part.contiguous() for name, part in zip(plain, scores, strict=True)}

    def _plan(self, routing: Routing, alive: Alive | None = None) -> tuple[mk.Plan, Tensor]:
        """Kernel plan and gates `[N, H, K]` of a choice per head, for the tokens that run."""
        offset = torch.arange(self.n_heads, device=routing.index.device)[:, None] * self.n_experts
        index = running((routing.index + offset).flatten(0, 1), alive)
        return mk.plan(index, self.n_heads * self.n_experts, disjoint=True), running(
            routing.gate.flatten(0, 1), alive
        )

    def _values(self, key: Tensor, value: Tensor, call: Call, scores: Tensor | None) -> tuple[Tensor, Stats]:
        """Values `[B, H, T, d_head]`; tokens at rest have theirs too, for others to read."""
        batch, length, _ = value.shape
        if self.value_router is None:
            return torch.einsum("btd,hdf->bhtf", value, self.value), {}
        routing = self.value_router(key, None) if scores is None else self.value_router(key, None, scores)
        stats = under("value_router", routing.stats)
        if self.n_experts == 1:
            v = torch.einsum("btd,hdf->bhtf", value, self.value)
            return v * routing.gate.squeeze(-1).transpose(1, 2)[..., None].to(v.dtype), stats
        plan, gate = self._plan(routing)
        v = mk.expert_split(
            value.flatten(0, 1),
            self.value,
            plan,
            gate,
            cast=call.copy_of("value"),
            ticket=call.ticket_of("value"),
            shares=call.shares,
        )
        return v.view(batch, length, self.n_heads, -1).transpose(1, 2), stats

    def _outputs(
        self, query: Tensor, mixed: Tensor, call: Call, scores: Tensor | None
    ) -> tuple[Tensor, Stats]:
        """Outputs `[B, T, D]`, or their parts `[B, T, H, D]`, of attended values `[B, H, T, d_head]`."""
        batch, _, length, _ = mixed.shape
        alive = call.alive
        routing = (
            self.output_router(query, alive) if scores is None else self.output_router(query, alive, scores)
        )
        stats = under("output_router", routing.stats)
        if self.n_experts == 1:
            gated = mixed * routing.gate.squeeze(-1).transpose(1, 2)[..., None].to(mixed.dtype)
            return torch.einsum("bhtf,hfd->btd", gated, self.output), stats
        plan, gate = self._plan(routing, alive)
        rows = running(mixed.transpose(1, 2).flatten(0, 1), alive)
        cast = call.copy_of("output")
        # parts of padded rows do not lie side by side
        apart = call.apart and (cast is None or cast.shape == self.output.shape)
        output = mk.expert_merge(
            rows, self.output, plan, gate, cast=cast, ticket=call.ticket_of("output"), summed=not apart
        )
        return everyone(output, alive).unflatten(0, (batch, length)), stats


class MixtureOfAttention(Mixer):
    """Experts with own query and output projections over shared keys and values (SUT, arXiv:2310.07096).

    An expert is a bundle of H heads. Each token's K chosen experts attend separately; their outputs are
    weighed by the gates and added.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_expert: int,
        d_head: int,
        router: Router,
        position: Position,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = d_expert // d_head
        self.query = nn.Parameter(torch.empty(router.n_experts, d_model, d_expert))
        self.output = nn.Parameter(torch.empty(router.n_experts, d_expert, d_model))
        self.key = Linear(d_model, d_expert, bias=False, lora=lora)
        self.value = Linear(d_model, d_expert, bias=False, lora=lora)
        self.router = router
        self.position = position

    def reset_parameters(self, *, scale: float) -> None:
        uniform_(self.query, bound=1.0 / self.query.shape[1])
        uniform_(self.output, bound=1.0 / self.output.shape[1])
        for linear in (self.key, self.value):
            xavier_uniform_(linear.weight, gain=1.0 / math.sqrt(2.0))
        self.router.reset_parameters(scale=scale)
        for linear in (self.key, self.value):
            linear.reset_lora()
        self.position.reset_parameters()

    def expert_weights(self) -> dict[str, Tensor]:
        return {"query": self.query, "output": self.output}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, past: Memory | None) -> Mixed:
        batch, length, d_model = query.shape
        alive = call.alive
        routing = self.router(query, alive)
        chosen = routing.index.shape[-1]
        # a chosen expert is a group of its own: its query stands alone, its output is merged with its gate
        choice = (part.reshape(batch * length, chosen, 1) for part in (routing.index, routing.gate))
        index, gate = (running(part, alive) for part in choice)
        plan = mk.plan(index, self.router.n_experts)
        queries = mk.expert_split(
            running(query.flatten(0, 1), alive), self.query, plan, None, cast=call.copy_of("query")
        )
        q = everyone(queries, alive).view(batch, length, -1)
        q = rotated_heads(q, chosen * self.n_heads, position=self.position, start=call.start)
        k = rotated_heads(self.key(key, call.repeat), self.n_heads, position=self.position, start=call.start)
        memory = remember(k, split_heads(self.value(value, call.repeat), self.n_heads), past, call.start)
        wide = tuple(part.repeat(1, chosen, 1, 1) for part in memory)
        mixed = attend(q, (wide[0], wide[1]), position=self.position, start=call.start)
        merged = mixed.transpose(1, 2).reshape(batch * length, chosen, -1)
        output = mk.expert_merge(running(merged, alive), self.output, plan, gate, cast=call.copy_of("output"))
        output = everyone(output, alive)
        return Mixed(
            output.view(batch, length, d_model),
            under("router", routing.stats),
            memory if call.remember else None,
        )
