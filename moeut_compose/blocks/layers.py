"""One layer: a mixer and a feedforward around the residual stream, with the norms where the placement says.

`context` is what keys and values are read from. Without halting it is the layer's own input; with halting it
is the mixture of halted and running states (see `halting.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from moeut_compose.blocks.cache import Memory
from moeut_compose.blocks.roles import Alive, FeedForward, Mixer
from moeut_compose.blocks.stats import Stats, under


class Run(NamedTuple):
    """What one application of a layer returns."""

    hidden: Tensor
    """`[B, T, D]`"""
    stats: Stats
    memory: Memory


class Layer(nn.Module):
    """A mixer, a feedforward and two norms; a subclass places the norms."""

    def __init__(
        self, mixer: Mixer, feedforward: FeedForward, mixer_norm: nn.Module, feedforward_norm: nn.Module
    ) -> None:
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def reset_parameters(self, *, scale: float) -> None:
        """Draw all weights; `scale` is the depth factor c of the published initialisation."""
        self.mixer.reset_parameters(scale=scale)
        self.feedforward.reset_parameters(scale=scale)
        for norm in (self.mixer_norm, self.feedforward_norm):
            norm.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        *,
        alive: Alive | None = None,
        start: int = 0,
        past: Memory | None = None,
    ) -> Run:
        """Apply the layer to `hidden [B, T, D]` at positions `start, start + 1, ...`."""
        x, mixer_stats, memory = self.mix(hidden, context, alive, start, past)
        x, feedforward_stats = self.transform(x, alive)
        return Run(x, under("mixer", mixer_stats) | under("feedforward", feedforward_stats), memory)

    @abstractmethod
    def mix(
        self, hidden: Tensor, context: Tensor, alive: Alive | None, start: int, past: Memory | None
    ) -> tuple[Tensor, Stats, Memory]:
        """The mixer with its residual."""

    @abstractmethod
    def transform(self, x: Tensor, alive: Alive | None) -> tuple[Tensor, Stats]:
        """The feedforward with its residual."""


class PreNormLayer(Layer):
    """Norm before each block: y = x + A(N1 x); x' = y + F(N2 y)."""

    def mix(
        self, hidden: Tensor, context: Tensor, alive: Alive | None, start: int, past: Memory | None
    ) -> tuple[Tensor, Stats, Memory]:
        query = self.mixer_norm(hidden)
        source = query if context is hidden else self.mixer_norm(context)
        output, stats, memory = self.mixer(query, source, source, alive=alive, start=start, past=past)
        return hidden + output, stats, memory

    def transform(self, x: Tensor, alive: Alive | None) -> tuple[Tensor, Stats]:
        normed = self.feedforward_norm(x)
        output, stats = self.feedforward(normed, normed, alive=alive)
        return x + output, stats


class PostNormLayer(Layer):
    """Norm after each residual sum: y = N1(x + A(x)); x' = N2(y + F(y))."""

    def mix(
        self, hidden: Tensor, context: Tensor, alive: Alive | None, start: int, past: Memory | None
    ) -> tuple[Tensor, Stats, Memory]:
        output, stats, memory = self.mixer(hidden, context, context, alive=alive, start=start, past=past)
        return self.mixer_norm(hidden + output), stats, memory

    def transform(self, x: Tensor, alive: Alive | None) -> tuple[Tensor, Stats]:
        output, stats = self.feedforward(x, x, alive=alive)
        return self.feedforward_norm(x + output), stats


class PeriNormLayer(Layer):
    """Norm only before what ends in a softmax or a sigmoid (arXiv:2405.16039, section 2.4).

    Queries, keys and all routers read a norm; values and experts read the residual stream itself.
    """

    def mix(
        self, hidden: Tensor, context: Tensor, alive: Alive | None, start: int, past: Memory | None
    ) -> tuple[Tensor, Stats, Memory]:
        query = self.mixer_norm(hidden)
        key = query if context is hidden else self.mixer_norm(context)
        output, stats, memory = self.mixer(query, key, context, alive=alive, start=start, past=past)
        return hidden + output, stats, memory

    def transform(self, x: Tensor, alive: Alive | None) -> tuple[Tensor, Stats]:
        output, stats = self.feedforward(x, self.feedforward_norm(x), alive=alive)
        return x + output, stats
