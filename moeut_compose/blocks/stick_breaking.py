"""The halting rule of SUT: stick-breaking over passes, with the halted mixture as what others attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeut_compose.blocks.halting import Halted, Halting, HaltingState, depth_stats
from moeut_compose.blocks.initialisation import uniform_
from moeut_compose.blocks.precision import at_least_float32


@dataclass(frozen=True)
class StickBreakingState(HaltingState):
    """Also the sums of the rule, `[B, T]` unless they say otherwise; None before the first decision."""

    log_alive: Tensor | None = None
    """Log-probability of not having halted."""
    mixed: Tensor | None = None
    """`[B, T, D]` sum of halted states, each weighed with its probability."""
    depth: Tensor | None = None
    """Expected depth of the halted mass."""
    expected: Tensor | None = None
    """Expected depth if what goes on halted now."""
    ponder: Tensor | None = None
    """Sum over passes of the mean expected depth, a scalar."""


class StickBreaking(Halting[StickBreakingState]):
    """Halting as in the published SUT runs (arXiv:2310.07096).

    After pass n a gate turns each hidden state into log-probabilities of going on and of halting. The halted
    mixture plus the rest of the mass times the newest state is what later passes read keys and values from,
    and the output. A token whose remaining mass falls below 1 - threshold keeps its mixture. In the loss,
    halting after the first pass counts as depth 0, and the mean expected depth is summed over passes.
    """

    def __init__(self, d_model: int, *, threshold: float, weight: float) -> None:
        super().__init__()
        self.remainder = 1.0 - threshold
        self.weight = weight
        self.inner = nn.Linear(d_model, d_model)
        self.outer = nn.Linear(d_model, 2, bias=False)

    def reset_parameters(self) -> None:
        for weight in (self.inner.weight, self.inner.bias):
            uniform_(weight, bound=self.inner.in_features**-0.5)
        nn.init.zeros_(self.outer.weight)

    def begin(self, x: Tensor) -> StickBreakingState:
        return StickBreakingState(hidden=x, context=x)

    def decide(self, state: StickBreakingState, repeat: int) -> StickBreakingState:
        hidden = state.hidden
        go_on, halt = at_least_float32(self.outer(F.gelu(self.inner(hidden)))).log_softmax(-1).unbind(-1)
        zero = torch.zeros_like(go_on)
        log_alive = zero if state.log_alive is None else state.log_alive
        halted = (log_alive + halt).exp()
        log_alive = log_alive + go_on
        share = halted[..., None] * hidden
        alive = log_alive.exp()
        alive = torch.where(alive < self.remainder, zero, alive)
        depth = (zero if state.depth is None else state.depth) + (repeat - 1) * halted
        expected = depth + alive * repeat
        ponder = expected.mean()
        return replace(
            state,
            alive=alive,
            log_alive=log_alive,
            mixed=share if state.mixed is None else state.mixed + share,
            depth=depth,
            expected=expected,
            ponder=ponder if state.ponder is None else state.ponder + ponder,
        )

    def absorb(self, state: StickBreakingState, hidden: Tensor) -> StickBreakingState:
        if state.alive is None or state.mixed is None:
            return replace(state, hidden=hidden, context=hidden)
        alive = state.alive[..., None]
        mixture = (state.mixed + alive * hidden).to(hidden.dtype)
        context = torch.where(alive == 0, state.context, mixture)
        return replace(state, hidden=hidden, context=context)

    def finish(self, state: StickBreakingState) -> Halted:
        if state.ponder is None or state.expected is None:
            return Halted(state.context, {}, depth_stats(torch.ones_like(state.hidden[..., 0])))
        losses = {"act": self.weight * state.ponder} if self.training else {}
        return Halted(state.context, losses, depth_stats(state.expected + 1))
