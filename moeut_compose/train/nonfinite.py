"""Finding out where a number that is none came from: slow, for when a run has to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeut_compose.blocks.layers import step_by_step
from moeut_compose.blocks.model import ModelOutput
from moeut_compose.train.parallel import own_part


def nonfinite_weight(model: nn.Module) -> str | None:
    """The name of the first weight that holds a NaN or an infinity, in the part of it that this process has."""
    named = list(model.named_parameters())
    sound = torch.stack([own_part(weight).isfinite().all() for _, weight in named]).tolist()
    return next((name for (name, _), is_sound in zip(named, sound, strict=True) if not is_sound), None)


def first_nonfinite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """What is not finite first when `run` takes `model` forward and backward; None if everything is finite.

    It is the output of the innermost module, or else the gradient nearest to the loss. Gradients are left on the
    parameters.
    """
    found: list[str] = []

    def watch_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(_is_finite(tensor) for tensor in _tensors(output)):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return look

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if not found and parameter.grad is not None and not _is_finite(own_part(parameter.grad)):
                found.append(f"gradient of {name}")

        return look

    hooks = [module.register_forward_hook(watch_output(name)) for name, module in model.named_modules()]
    hooks += [
        parameter.register_post_accumulate_grad_hook(watch_gradient(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        # compiled code would not call the hooks, nor would norms that take sums along
        with torch.compiler.set_stance("force_eager"), step_by_step(model):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():  # gradients of split weights arrive without a hook
        if isinstance(parameter, DTensor):
            watch_gradient(name)(parameter)
    return found[0] if found else None


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    match output:
        case Tensor():
            yield output
        case dict():
            for part in output.values():
                yield from _tensors(part)
        case tuple() | list():
            for part in output:
                yield from _tensors(part)
        case ModelOutput():
            yield from _tensors(vars(output))
