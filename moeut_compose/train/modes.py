"""Process-wide switches of a run, put back afterwards."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import moeut_kernels
import torch

from moeut_compose.blocks.layers import Layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
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


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
"""Parameters of mallopt(3)."""
_KEPT = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20, _MMAP_MAX: 0}
_USUAL = {_TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 128 * 1024, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536}
"""What glibc begins with, but for its two thresholds: those grow by themselves as blocks are freed, up to these values,
and stand still once anything is set."""
_keepers = 0


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """While training on a CPU inside, the C library keeps memory that is freed for the next tensor of the process.

    It would hand large blocks back to the system, which clears and maps every page anew, step after step. Nothing
    changes on other devices, other C libraries than glibc, and where the environment sets up its allocator.
    """
    global _keepers
    if device.type != "cpu" or not _has_glibc() or _sets_up_malloc(os.environ):
        yield
        return
    glibc = ctypes.CDLL(None)
    for parameter, value in _KEPT.items():
        glibc.mallopt(parameter, value)
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            for parameter, value in _USUAL.items():
                glibc.mallopt(parameter, value)
            glibc.malloc_trim(0)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # not POSIX; another C library
        return False


def _sets_up_malloc(environment: Mapping[str, str]) -> bool:
    return "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in environment
    )


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
