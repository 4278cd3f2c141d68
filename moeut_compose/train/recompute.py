"""Activation checkpointing: layers compute again in the backward pass what they did not keep.

Experts are never chosen again. A second run may round differently, and a token sent elsewhere would get the gradient
of a computation that never happened. So choices and random draws are kept in every mode, and the second run gets
them from there; it draws nothing, and the random state need not be put back.
"""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import moeut_kernels  # noqa: F401  (registers the operators named below)
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moeut_compose.blocks.layers import Layer, add_parts
from moeut_compose.blocks.stages import defer_gradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeut_compose.blocks.cache import Memory
    from moeut_compose.blocks.layers import Run
    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.blocks.roles import Call

ActivationCheckpointing = Literal["none", "full", "selective"]
MODES: tuple[ActivationCheckpointing, ...] = ("full", "selective")

_CHOICES = frozenset({torch.ops.aten.topk.default, torch.ops.moeut.topk.default})
_PRODUCTS = frozenset(
    {
        torch.ops.moeut.plan.default,
        torch.ops.moeut.expert_feedforward.default,
        torch.ops.moeut.expert_split.default,
        torch.ops.moeut.expert_merge.default,
    }
)


def keeps(mode: ActivationCheckpointing, op: Any, *, compiled: bool) -> bool:
    """Whether a checkpointed layer keeps what the operator `op` returned.

    Choices and draws always; `selective` also attention, the order of slots by expert, and expert products. Compiled
    layers always keep attention: it could draw a dropout, and to run it again the compiler would save and set random
    states, which a CUDA graph cannot record.
    """
    is_attention = "scaled_dot_product" in op.name()
    is_draw = torch.Tag.nondeterministic_seeded in op.tags and not is_attention
    assert not (is_draw and op._schema.is_mutable), f"{op.name()} draws in place, which cannot be kept"
    if op in _CHOICES or is_draw or (is_attention and compiled):
        return True
    return mode == "selective" and (is_attention or op in _PRODUCTS)


def checkpoint_layers(model: LanguageModel, mode: ActivationCheckpointing) -> None:
    """Let every layer of `model` keep little for its backward pass and run again there; before `compile_layers`.

    Hooks stay outside: weights that are split over processes are there when a layer runs again. With `full`, uses of
    expert weights add up their gradients: waiting for the last use would hold the rows that were not to be held.
    """
    if mode == "none":
        return
    if mode == "full":
        defer_gradients(model, False)
    add_parts(model, mode != "selective")  # which keeps what products return
    for module in model.modules():
        if isinstance(module, Layer):
            module.forward = recomputed(module.forward, mode)  # type: ignore[method-assign]


def recomputed(forward: Callable[..., Run], mode: ActivationCheckpointing) -> Callable[..., Run]:
    """A layer's `forward` that runs again in the backward pass; without gradients, `forward` itself."""
    policy = partial(_policy, mode)
    compiled_contexts = partial(create_selective_checkpoint_contexts, policy)
    eager_contexts = partial(_contexts, mode)

    def run(hidden: Tensor, context: Tensor, call: Call | None = None, past: Memory | None = None) -> Run:
        if not torch.is_grad_enabled():
            return forward(hidden, context, call, past)
        own = context is hidden  # layers ask for this identity, which saved tensors lose

        def again(hidden: Tensor, context: Tensor | None) -> Run:
            return forward(hidden, hidden if context is None else context, call, past)

        contexts = compiled_contexts if torch.compiler.is_compiling() else eager_contexts
        return checkpoint(
            again,
            hidden,
            None if own else context,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )

    return run


def _policy(mode: ActivationCheckpointing, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For compiled layers, whose partitioner obeys it."""
    known = isinstance(op, torch._ops.OpOverload) and keeps(mode, op, compiled=True)
    return CheckpointPolicy.MUST_SAVE if known else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(mode: ActivationCheckpointing) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For layers that are not compiled: what the first run keeps, the second finds.

    PyTorch's own pair wants both runs to call the same operators. Under autocast they do not: weights that an earlier
    use has cast are cast again when a layer runs alone.
    """
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(mode, kept), _Find(mode, kept)


class _Keep(TorchDispatchMode):
    """Keeps results of operators, in the order in which they were called."""

    def __init__(self, mode: ActivationCheckpointing, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self._mode = mode
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if keeps(
            self._mode, func, compiled=False
        ):  # detached, or the results would hold the graph that holds them
            self._kept[func].append(tree_map_only(Tensor, torch.detach, out))
        return out


class _Find(TorchDispatchMode):
    """Hands out what `_Keep` kept instead of calling operators again."""

    def __init__(self, mode: ActivationCheckpointing, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self._mode = mode
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if keeps(self._mode, func, compiled=False):
            return self._kept[func].popleft()
        return func(*args, **(kwargs or {}))
