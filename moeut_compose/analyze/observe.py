"""What layers and routers do in a forward pass, seen through hooks that change nothing of what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moeut_compose.blocks.layers import Layer, Run
from moeut_compose.blocks.roles import Alive, Call, FeedForward, Mixed, Mixer, Router, Routing
from moeut_compose.blocks.stages import Stage

if TYPE_CHECKING:
    from moeut_compose.blocks.model import LanguageModel


class Choice(NamedTuple):
    """One call of a router."""

    gate: Tensor
    """`[B, T, H, E]` weight of every expert; zero where it was not chosen."""
    logits: Tensor
    """`[B, T, H, E]`"""
    runs: Tensor
    """`[B, T]` booleans: the tokens that the router chose for."""

    @classmethod
    def of(cls, routing: Routing, alive: Alive | None) -> Choice:
        logits = routing.logits
        gate = torch.zeros_like(logits).scatter(-1, routing.index.long(), routing.gate.to(logits))
        runs = torch.ones_like(logits[..., 0, 0], dtype=torch.bool) if alive is None else ~alive.rests
        return cls(gate, logits, runs)


@dataclass
class Application:
    """One call of a layer. All tensors are `[B, T, D]` unless they say otherwise."""

    stage: int
    member: int
    repeat: int
    before: Tensor
    mass: Tensor
    """`[B, T]` what of each token has not halted."""
    mixed: Tensor = field(init=False)
    """What the mixer returned."""
    transformed: Tensor = field(init=False)
    """What the feedforward added, or returned where its output is normalised."""
    after: Tensor = field(init=False)
    choices: dict[str, Choice] = field(default_factory=dict)
    """By the name of the router inside the layer, such as `feedforward.router`."""

    @property
    def runs(self) -> Tensor:
        """`[B, T]` booleans: the tokens that have not halted."""
        return self.mass > 0


@contextmanager
def observing(model: LanguageModel) -> Iterator[list[Application]]:
    """The list that forward passes inside the block append their applications to, in running order.

    Clear it between passes; tensors are those of the pass, without copies. Routers that a layer keeps for
    every pass (numbered parts of a list) count as one router.
    """
    seen: list[Application] = []
    with ExitStack() as stack:
        for stage_index, stage in enumerate(model.stages):
            assert isinstance(stage, Stage)
            for member, layer in enumerate(stage.layers):
                assert isinstance(layer, Layer)
                for handle in _watch(layer, stage_index, member, seen):
                    stack.callback(handle.remove)
        yield seen


def _watch(layer: Layer, stage: int, member: int, seen: list[Application]) -> Iterator[Any]:
    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        hidden, _context, call, *_past = (*arguments, None, None)
        call = call or Call()
        mass = hidden.new_ones(hidden.shape[:2]) if call.alive is None else call.alive.mass
        seen.append(Application(stage, member, call.repeat, hidden, mass))

    def end(_: nn.Module, arguments: tuple[Any, ...], run: Run) -> None:
        seen[-1].after = run.hidden

    def mix(_: Mixer, arguments: tuple[Any, ...], mixed: Mixed) -> None:
        seen[-1].mixed = mixed.output

    def transform(
        _: FeedForward, arguments: tuple[Any, ...], options: dict[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        residual = options.get("residual")
        seen[-1].transformed = output[0] if residual is None else output[0] - residual

    yield layer.register_forward_pre_hook(begin)
    yield layer.register_forward_hook(end)
    yield layer.mixer.register_forward_hook(mix)
    yield layer.feedforward.register_forward_hook(transform, with_kwargs=True)
    for name, module in layer.named_modules():
        if isinstance(module, Router):
            yield module.register_forward_hook(_recorder(role_of(name), seen))


def _recorder(role: str, seen: list[Application]) -> Any:
    def record(_: Router, arguments: tuple[Any, ...], routing: Routing) -> None:
        alive = next((argument for argument in arguments if isinstance(argument, Alive)), None)
        seen[-1].choices[role] = Choice.of(routing, alive)

    return record


def role_of(name: str) -> str:
    """The name of a router inside its layer without the numbers of list entries."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
