"""Process-wide switches of a run, put back afterwards."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import moeut_kernels
import torch

from moeut_compose.blocks.layers import Layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.recipe import RecipeSpec


@contextmanager
def execution_modes(recipe: RecipeSpec) -> Iterator[None]:
    """Choose the implementation of the expert products and determinism, as a recipe asks."""
    with ExitStack() as stack:
        if recipe.backend != "auto":
            stack.enter_context(moeut_kernels.use_backend(recipe.backend))
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
            # PyTorch would fill fresh memory, in case something reads what nobody wrote; no kernel of ours does.
            stack.callback(_fill_fresh_memory, torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]
            _fill_fresh_memory(False)
        if recipe.compile is True:
            stack.enter_context(uncut_layers())
        yield


def _fill_fresh_memory(fill: bool) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def uncut_layers() -> AbstractContextManager[None]:
    """While compiling inside: layers stay whole, though DDP would cut them up at its buckets and lose fusions."""
    return torch._dynamo.config.patch(optimize_ddp=False)


def compile_layers(model: LanguageModel) -> None:
    """Compile every layer with weights of its own, once, however often it runs, and the loss of a chunk.

    Hooks stay outside: those that gather split weights cannot be compiled.
    """
    model.loss_and_gradient = torch.compile(model.loss_and_gradient)
    for module in model.modules():
        if isinstance(module, Layer):
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
