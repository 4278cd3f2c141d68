"""What stands for `torch.library` in exported code: operators that are registered nowhere.

Exported models of several versions can be loaded side by side, which global names of operators would forbid.
An operator here is its plain PyTorch body, with its own formula for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

OPERATORS = SimpleNamespace()
"""All operators by name, as `torch.ops` would hold them."""


class Operator:
    """A function, with a gradient formula once one is registered."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.call: Callable[..., Any] = body
        self.body = body

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> None:
        """Nothing to do: there is no operator to be opaque."""

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Let `backward` be the derivative; an argument that is a list of tensors has none."""

        def derivative(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return tuple(None if isinstance(part, list) else part for part in backward(ctx, *gradients))

        parts = {"forward": self.body, "setup_context": setup_context, "backward": derivative}
        methods = {name: staticmethod(part) for name, part in parts.items()}
        function: Any = type("OperatorFunction", (torch.autograd.Function,), methods)
        self.call = function.apply


def custom_op(
    name: str, body: Callable[..., Any] | None = None, *, mutates_args: tuple[()], schema: str
) -> Any:
    """As `torch.library.custom_op`: the operator, or a decorator that makes it."""

    def define(body: Callable[..., Any]) -> Operator:
        operator = Operator(body)
        setattr(OPERATORS, name.partition("::")[2], operator)
        return operator

    return define if body is None else define(body)


def register_flop_formula(operator: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Nothing to do: plain products are counted as they are."""
    return lambda formula: formula
