"""What tells the passes through a stage apart: its input again, and the number of the pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moeut_compose.blocks.cache import Start, positions
from moeut_compose.blocks.initialisation import normal_
from moeut_compose.blocks.precision import at_least_float32


class Injection(nn.Module, ABC):
    """How the input of a stage enters every pass."""

    def reset_parameters(self) -> None:
        """Draw the weights; nothing to do by default."""

    def start(self, x: Tensor) -> Tensor:
        """What the first pass begins with: the input `x [B, T, D]` by default."""
        return x

    @abstractmethod
    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """What a later pass begins with, of the state and the input of the stage, each `[B, T, D]`."""


class NoInjection(Injection):
    """The state alone."""

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return state


class AddInjection(Injection):
    """State + input (arXiv:2311.12424)."""

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return state + x


class GateInjection(Injection):
    """g state + (1 - g) input, where g = sigmoid(W [state; input] + b) begins at one half."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * d_model, d_model)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        gate = at_least_float32(self.gate(torch.cat((state, x), dim=-1))).sigmoid()
        return gate * state + (1.0 - gate) * x


class ConcatInjection(Injection):
    """W [state; input] (arXiv:2502.05171); the first pass begins with a state of zero."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        normal_(self.linear.weight, std=self.linear.in_features**-0.5)

    def start(self, x: Tensor) -> Tensor:
        return self(torch.zeros_like(x), x)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        return self.linear(torch.cat((state, x), dim=-1))


class StepEmbedding(nn.Module, ABC):
    """What is added to the state at the beginning of every pass."""

    def reset_parameters(self) -> None:
        """Draw the weights; nothing to do by default."""

    @abstractmethod
    def forward(self, x: Tensor, repeat: int, start: Start) -> Tensor:
        """`x [B, T, D]` at positions `start, start + 1, ...` with the mark of pass `repeat`."""


class NoStep(StepEmbedding):
    """Nothing."""

    def forward(self, x: Tensor, repeat: int, start: Start) -> Tensor:
        return x


class SinusoidalStep(StepEmbedding):
    """Sinusoids of the pass, and of the position where `positions` says so (arXiv:1807.03819, equations 6 and 7).

    Channels 2j and 2j + 1 hold sine and cosine of n / 10000^(2j/D), with passes and positions counted from
    zero.
    """

    def __init__(self, d_model: int, *, positions: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.positions = positions

    def sinusoids(self, numbers: Tensor) -> Tensor:
        """`[..., D]` of passes or positions `[...]`, in float32."""
        exponents = (
            torch.arange(0, self.d_model, 2, device=numbers.device, dtype=torch.float32) / self.d_model
        )
        angles = numbers[..., None].float() / 10000.0**exponents
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.d_model]

    def forward(self, x: Tensor, repeat: int, start: Start) -> Tensor:
        mark = self.sinusoids(positions(repeat, 1, x.device))
        if self.positions:
            mark = mark + self.sinusoids(positions(start, x.shape[1], x.device))
        return x + mark.to(x.dtype)


class LearnedStep(StepEmbedding):
    """A vector of each pass, zero at the start."""

    def __init__(self, d_model: int, *, n_repeats: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_repeats, d_model))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, repeat: int, start: Start) -> Tensor:
        return x + self.weight[repeat]
