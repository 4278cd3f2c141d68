"""The parts a layer is made of, as abstract classes: what each takes and returns.

A class of this package is abstract (here) or final (everywhere else).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from moeut_kernels import Shares, ShareShape, Ticket
from torch import Tensor, nn

from moeut_compose.blocks.cache import Memory, Start
from moeut_compose.blocks.stats import Stats, below

Copies = dict[str, Tensor]
Tickets = dict[str, Ticket]


class Alive(NamedTuple):
    """Which tokens still run, where a stage halts tokens one by one."""

    mass: Tensor
    """`[B, T]` what of each token has not halted; zero at rest."""
    rows: Tensor | None = None
    """Places in `B * T` of the tokens that run, where products skip the others; None to compute all.

    Both give the same results: a token at rest weighs all its experts with zero.
    """

    @property
    def rests(self) -> Tensor:
        """`[B, T]` booleans."""
        return self.mass == 0


def running(x: Tensor, alive: Alive | None) -> Tensor:
    """The rows of `x [B * T, ...]` that products have to compute."""
    return x if alive is None or alive.rows is None else x.index_select(0, alive.rows)


def everyone(x: Tensor, alive: Alive | None) -> Tensor:
    """Undo `running`: rows of tokens that were skipped are zero."""
    if alive is None or alive.rows is None:
        return x
    return x.new_zeros(alive.mass.numel(), *x.shape[1:]).index_copy(0, alive.rows, x)


class Call(NamedTuple):
    """Where and when a layer runs."""

    repeat: int = 0
    """The pass over its stage, from 0."""
    start: Start = 0
    """Position of the first new token, or of that of each sequence."""
    alive: Alive | None = None
    """Who runs; None for everyone."""
    remember: bool = True
    """Whether a later call will want the keys and values: what is returned for nobody still gets gradients."""
    copies: Copies | None = None
    """Expert weights of the layer in the dtype of autocast, by name; None to make them when they are needed."""

    tickets: Tickets | None = None
    """For weights whose gradient is formed once for all calls: what this call hands in, by the names of `copies`."""
    shares: Shares | None = None
    """Where experts that multiply the data hand back its gradient in rows, for the norm before them to add up."""
    apart: bool = False
    """Whether the norm after a mixer can add up the parts of its output, too."""

    def inside(self, part: str) -> Call:
        """The same call for a part of the layer, with its copies and tickets under their own names."""
        copies = None if self.copies is None else below(part, self.copies)
        tickets = None if self.tickets is None else below(part, self.tickets)
        return self._replace(copies=copies, tickets=tickets)

    def copy_of(self, name: str) -> Tensor | None:
        """The copy of one expert weight, if there is one."""
        return None if self.copies is None else self.copies.get(name)

    def ticket_of(self, name: str) -> Ticket | None:
        """The ticket of one expert weight, if there is one."""
        return None if self.tickets is None else self.tickets.get(name)


class Routing(NamedTuple):
    """Which experts each token uses, and how strongly."""

    index: Tensor  # type: ignore[assignment]  # a field, not the method of tuples
    """`[B, T, H, K]` integers in `[0, n_experts)`."""
    gate: Tensor
    """`[B, T, H, K]` weights of the chosen experts."""
    stats: Stats
    logits: Tensor
    """`[B, T, H, E]` scores of all experts, at least float32: what the choice was made from, for observers."""


class Mixed(NamedTuple):
    """What a mixer returns."""

    output: Tensor
    """`[B, T, D]`, to be added to the residual stream; if asked for, `[B, T, H, D]` parts of it (`Call.apart`)."""
    stats: Stats
    memory: Memory | None
    """Keys and values of all positions seen so far, if they are to be remembered."""


class Position(nn.Module, ABC):
    """How attention scores depend on positions."""

    def reset_parameters(self) -> None:
        """Draw the weights and fill the tables."""
        self.fill_tables()

    def fill_tables(self) -> None:
        """Compute buffers that no checkpoint holds; nothing to do by default."""

    @abstractmethod
    def rotate(self, x: Tensor, start: Start) -> Tensor:
        """Queries or keys `[B, T, H, d_head]` at positions `start, start + 1, ...`, transformed."""

    @abstractmethod
    def bias(self, query: Tensor, start: Start, n_keys: int) -> Tensor | None:
        """Scores `[B, H, T, n_keys]` to add before the softmax, or None. Queries stand from `start` on."""


class Router(nn.Module, ABC):
    """Chooses experts for each token."""

    n_experts: int

    @property
    @abstractmethod
    def n_choices(self) -> int:
        """Length of the last dimension of `Routing.index`."""

    @abstractmethod
    def reset_parameters(self, *, scale: float) -> None:
        """Draw the weights; `scale` is the depth factor c of the published initialisation."""

    @abstractmethod
    def forward(self, x: Tensor, alive: Alive | None) -> Routing:
        """Route `x [B, T, D]`. Tokens at rest get the weight zero."""

    @abstractmethod
    def losses(self, stats: Stats) -> dict[str, Tensor]:
        """Weighted balance terms from pooled `stats`."""

    def steer(self, stats: Stats) -> None:
        """Adjust what feedback controls, after an optimiser step, from pooled `stats`; nothing by default."""


class Mixer(nn.Module, ABC):
    """Moves information between positions."""

    @abstractmethod
    def reset_parameters(self, *, scale: float) -> None:
        """Draw the weights; `scale` is the depth factor c of the published initialisation."""

    def expert_weights(self) -> dict[str, Tensor]:
        """Weights that expert products read, by the names under which `Call.copies` holds their copies."""
        return {}

    @property
    def takes_padded(self) -> bool:
        """Whether the copies of those weights may be padded, see `moeut_kernels.cast_weights`."""
        return False

    def tickets(self, n_calls: int, n_tokens: int, copies: Copies) -> list[Tickets]:
        """For each of `n_calls` calls on `n_tokens` tokens: tickets of weights that can wait for their gradient."""
        return [{} for _ in range(n_calls)]

    def shares(self, value: Tensor, copies: Copies | None) -> ShareShape | None:
        """What experts hand back of the gradient of `value [B, T, D]`, where a norm can add it up; None for nothing."""
        return None

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, past: Memory | None) -> Mixed:
        """Mix `[B, T, D]` inputs of queries, keys (and routers of values) and values, causally.

        `past` holds the memory of the tokens before `call.start`.
        """


class FeedForward(nn.Module, ABC):
    """Mixes channels of each token."""

    @abstractmethod
    def reset_parameters(self, *, scale: float) -> None:
        """Draw the weights; `scale` is the depth factor c of the published initialisation."""

    def expert_weights(self) -> dict[str, Tensor]:
        """Weights that expert products read, by the names under which `Call.copies` holds their copies."""
        return {}

    @property
    def takes_padded(self) -> bool:
        """Whether the copies of those weights may be padded, see `moeut_kernels.cast_weights`."""
        return False

    def tickets(self, n_calls: int, n_tokens: int, copies: Copies) -> list[Tickets]:
        """For each of `n_calls` calls on `n_tokens` tokens: tickets of weights that can wait for their gradient."""
        return [{} for _ in range(n_calls)]

    def shares(self, data: Tensor, copies: Copies | None) -> ShareShape | None:
        """What experts hand back of the gradient of `data [B, T, D]`, where a norm can add it up; None for nothing."""
        return None

    @abstractmethod
    def forward(
        self, data: Tensor, select: Tensor, call: Call, residual: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        """Transform `data [B, T, D]` and add it to `residual`, if there is one; routers read `select [B, T, D]`."""
