"""One layer: a mixer and a feedforward around the residual stream, with the norms where the placement says.

`context` is what keys and values are read from. Without halting it is the layer's own input; with halting it
is the mixture of halted and running states (see `halting.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import moeut_kernels as mk
import torch
from torch import Tensor, nn

from moeut_compose.blocks.cache import Memory
from moeut_compose.blocks.norms import Norm
from moeut_compose.blocks.roles import Call, Copies, FeedForward, Mixed, Mixer, Tickets
from moeut_compose.blocks.stats import Stats, below, under


class Run(NamedTuple):
    """What one application of a layer returns."""

    hidden: Tensor
    """`[B, T, D]`"""
    stats: Stats
    memory: Memory | None


class Layer(nn.Module):
    """A mixer, a feedforward and two norms; a subclass places the norms."""

    in_one_pass: bool
    """Let norms take sums and casts around them along, where that pays; hooks on the norms are not called then."""
    adds_parts: bool
    """Let the norm after the mixer add up the parts of its output, too. They are large to be kept."""

    def __init__(
        self, mixer: Mixer, feedforward: FeedForward, mixer_norm: Norm, feedforward_norm: Norm
    ) -> None:
        super().__init__()
        self.in_one_pass = self.adds_parts = True
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def reset_parameters(self, *, scale: float) -> None:
        """Draw all weights; `scale` is the depth factor c of the published initialisation."""
        self.mixer.reset_parameters(scale=scale)
        self.feedforward.reset_parameters(scale=scale)
        self.mixer_norm.reset_parameters()
        self.feedforward_norm.reset_parameters()

    def copies(self, dtype: torch.dtype) -> Copies:
        """Copies of all expert weights in `dtype`, made once for all applications of the layer."""
        copies: Copies = {}
        for name, part in (("mixer", self.mixer), ("feedforward", self.feedforward)):
            weights = part.expert_weights()
            # only training is worth it: in decoding, products of few rows read the copies as they are
            padded = part.takes_padded and torch.is_grad_enabled() and next(part.parameters()).is_cuda
            casts = mk.cast_weights(*weights.values(), dtype=dtype, padded=padded)
            copies |= under(name, dict(zip(weights, casts, strict=True)))
        return copies

    def tickets(self, n_calls: int, n_tokens: int, copies: Copies) -> list[Tickets]:
        """For each of `n_calls` applications to `n_tokens` tokens: what lets weights wait for the last of them."""
        mixer = self.mixer.tickets(n_calls, n_tokens, below("mixer", copies))
        feedforward = self.feedforward.tickets(n_calls, n_tokens, below("feedforward", copies))
        return [
            under("mixer", of_mixer) | under("feedforward", of_feedforward)
            for of_mixer, of_feedforward in zip(mixer, feedforward, strict=True)
        ]

    def forward(
        self, hidden: Tensor, context: Tensor, call: Call | None = None, past: Memory | None = None
    ) -> Run:
        """Apply the layer to `hidden [B, T, D]`; keys and values come from `context` and from `past`."""
        call = Call() if call is None else call
        x, mixer_stats, memory = self.mix(hidden, context, call.inside("mixer"), past)
        x, feedforward_stats = self.transform(x, call.inside("feedforward"))
        return Run(x, under("mixer", mixer_stats) | under("feedforward", feedforward_stats), memory)

    @abstractmethod
    def mix(self, hidden: Tensor, context: Tensor, call: Call, past: Memory | None) -> Mixed:
        """The mixer with its residual."""

    @abstractmethod
    def transform(self, x: Tensor, call: Call) -> tuple[Tensor, Stats]:
        """The feedforward with its residual."""


class PreNormLayer(Layer):
    """Norm before each block: y = x + A(N1 x); x' = y + F(N2 y)."""

    def mix(self, hidden: Tensor, context: Tensor, call: Call, past: Memory | None) -> Mixed:
        query = self.mixer_norm(hidden, call.repeat)
        source = query if context is hidden else self.mixer_norm(context, call.repeat)
        output, stats, memory = self.mixer(query, source, source, call, past)
        return Mixed(hidden + output, stats, memory)

    def transform(self, x: Tensor, call: Call) -> tuple[Tensor, Stats]:
        normed = self.feedforward_norm(x, call.repeat)
        return self.feedforward(normed, normed, call, residual=x)


class PostNormLayer(Layer):
    """Norm after each residual sum: y = N1(x + A(x)); x' = N2(y + F(y))."""

    def mix(self, hidden: Tensor, context: Tensor, call: Call, past: Memory | None) -> Mixed:
        output, stats, memory = self.mixer(hidden, context, context, call, past)
        return Mixed(self.mixer_norm(hidden + output, call.repeat), stats, memory)

    def transform(self, x: Tensor, call: Call) -> tuple[Tensor, Stats]:
        output, stats = self.feedforward(x, x, call)
        return self.feedforward_norm(x + output, call.repeat), stats


class PeriNormLayer(Layer):
    """Norm only before what ends in a softmax or a sigmoid (arXiv:2405.16039, section 2.4).

    Queries, keys and all routers read a norm; values and experts read the residual stream itself.
    """

    def mix(self, hidden: Tensor, context: Tensor, call: Call, past: Memory | None) -> Mixed:
        query = self.mixer_norm(hidden, call.repeat)
        key = query if context is hidden else self.mixer_norm(context, call.repeat)
        output, stats, memory = self.mixer(query, key, context, call, past)
        return Mixed(hidden + output, stats, memory)

    def transform(self, x: Tensor, call: Call) -> tuple[Tensor, Stats]:
        return self.feedforward(x, self.feedforward_norm(x, call.repeat), call, residual=x)

    def forward(
        self, hidden: Tensor, context: Tensor, call: Call | None = None, past: Memory | None = None
    ) -> Run:
        call = Call() if call is None else call
        if not self.in_one_pass or context is not hidden or call.alive is not None or not mk.fans(hidden):
            return super().forward(hidden, context, call, past)
        return self._fanned(hidden, call, past)

    def _fanned(self, hidden: Tensor, call: Call, past: Memory | None) -> Run:
        """The same, with each norm, the sum before it and the gradients that meet there in one pass."""
        of_mixer, of_feedforward = call.inside("mixer"), call.inside("feedforward")
        shape, rows = hidden.shape, hidden.flatten(0, 1)
        fan = self.mixer_norm.fan(rows, call.repeat, shares=self.mixer.shares(hidden, of_mixer.copies))
        normed, data = fan.normed.view(shape), fan.data.view(shape)
        of_mixer = of_mixer._replace(shares=fan.shares, apart=self.adds_parts)
        output, mixer_stats, memory = self.mixer(normed, normed, data, of_mixer, past)
        shares = self.feedforward.shares(hidden, of_feedforward.copies)
        fan = self.feedforward_norm.fan(fan.residual, call.repeat, addend=output.flatten(0, 1), shares=shares)
        x, feedforward_stats = self.feedforward(
            fan.data.view(shape),
            fan.normed.view(shape),
            of_feedforward._replace(shares=fan.shares),
            residual=fan.residual.view(shape),
        )
        return Run(x, under("mixer", mixer_stats) | under("feedforward", feedforward_stats), memory)


@contextmanager
def step_by_step(model: nn.Module) -> Iterator[None]:
    """Inside, layers of `model` take sums, norms and casts one by one, so that hooks see every module."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    before = [layer.in_one_pass for layer in layers]
    try:
        for layer in layers:
            layer.in_one_pass = False
        yield
    finally:
        for layer, in_one_pass in zip(layers, before, strict=True):
            layer.in_one_pass = in_one_pass


def add_parts(model: nn.Module, add: bool = True) -> None:
    """Let norms of all layers of `model` add up the parts of what mixers return, or let mixers do it."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.adds_parts = add
