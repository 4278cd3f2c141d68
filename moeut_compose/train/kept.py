"""What a forward pass keeps for its backward pass, tensor by tensor.

The step is run on fake tensors: shapes and dtypes without memory, autocast and our operators included. Autograd says
what it saves. What compiled layers save instead follows by four rules, which the partitioner of `torch.compile` obeys:

- a tensor that several products read is cast once (eager mode casts for each of them);
- inside a layer, the output of a block is kept in the dtype of products, and the residual sum formed again (where sum
  and norm are one pass, neither is kept in either mode);
- a router keeps its scores instead of their float32 softmax;
- the backward of ReLU in a dense feedforward reads a mask of one byte.

Layers that run again in the backward pass keep their inputs, what `recompute.py` names, and for a moment all that one
of them saves: so the trace notes where each tensor was made.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import moeut_kernels
import torch
from moeut_kernels.backend import LEAST_THREADS, n_threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeut_compose.blocks.layers import Layer, add_parts
from moeut_compose.build import build_model
from moeut_compose.spec.feedforwards import DenseSpec
from moeut_compose.train.recompute import MODES, keeps

if TYPE_CHECKING:
    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.device import PrecisionName
    from moeut_compose.train.recompute import ActivationCheckpointing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast multiplies in; float32 goes without it."""
_HEAD_ALIGNMENT = 8
"""Fused attention on CUDA pads heads to a multiple of this many channels."""


@dataclass(frozen=True)
class Kept:
    """Bytes: `fixed` whatever the batch, copies of weights above all; `per_sequence` for each sequence."""

    fixed: int
    per_sequence: int
    checkpointed: Mapping[ActivationCheckpointing, Kept] = field(default_factory=dict)
    """The same with activation checkpointing: what layers keep, and what the largest saves when it runs again."""


def trace_kept(
    spec: ModelSpec,
    context: int,
    precision: PrecisionName,
    *,
    device_type: str = "cpu",
    compiled: bool = False,
) -> Kept:
    """Trace two and three sequences of `context` tokens; the difference is what every further one adds."""
    model = build_model(spec, device="meta").train()
    add_parts(model, False)  # as where results of products are kept; elsewhere nobody keeps them

    def measure(batch: int) -> dict[ActivationCheckpointing, int]:
        trace = _run(model, batch, context, precision, device_type=device_type, compiled=compiled)
        return trace.bytes(
            _Sizes(spec, batch, context, on_cuda=device_type == "cuda", compiled=compiled), spec.depth
        )

    two, three = measure(2), measure(3)  # one alone is special: what is transposed there is not copied
    found = {mode: _line(two[mode], three[mode]) for mode in two}
    plain = found.pop("none")
    return Kept(plain.fixed, plain.per_sequence, found)


def _line(two: int, three: int) -> Kept:
    return Kept(fixed=max(0, two - 2 * (three - two)), per_sequence=three - two)


class _Trace(TorchDispatchMode):
    """What a forward pass saves, and for tensors made by a layer, which of its applications made them."""

    def __init__(self, own: set[int], *, compiled: bool) -> None:
        super().__init__()
        self._own = own
        self._compiled = compiled
        self._saved: dict[int, Tensor] = {}
        self._made: dict[int, int | None] = {}
        self._elsewhere: set[int] = set()
        """Saved outside of layers."""
        self._kept: dict[ActivationCheckpointing, list[Tensor]] = {mode: [] for mode in MODES}
        self._n_applications = 0
        self._now: int | None = None

    def enter(self, layer: Layer, args: tuple[Any, ...]) -> None:
        """Before a layer application: both modes keep its hidden state and context."""
        self._now = self._n_applications
        self._n_applications += 1
        for kept in self._kept.values():
            kept += args[:2]

    def leave(self, *_: Any) -> None:
        self._now = None

    def save(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._own:
            self._saved.setdefault(address, tensor)
            if self._now is None:
                self._elsewhere.add(address)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        new = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._made |= {_address(tensor): self._now for tensor in new if _address(tensor) not in old}
        if self._now is not None:
            for mode, kept in self._kept.items():
                kept += new if keeps(mode, func, compiled=self._compiled) else ()
        return out

    def bytes(self, sizes: _Sizes, depth: int) -> dict[ActivationCheckpointing, int]:
        """By mode; "none" is all that is saved."""
        saved = {address: sizes.of(tensor) for address, tensor in self._saved.items()}
        found: dict[ActivationCheckpointing, int] = {"none": sum(saved.values()) + sizes.masks()}
        for mode, tensors in self._kept.items():
            kept = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
            stays, again = (
                sum(kept.values()),
                dict.fromkeys(range(self._n_applications), sizes.masks() // depth),
            )
            for address, n_bytes in saved.items():
                place = self._made.get(address)
                if address in kept:
                    continue
                if place is None or address in self._elsewhere:
                    stays += n_bytes
                else:
                    again[place] += n_bytes
            found[mode] = stays + max(again.values(), default=0)
        return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _OneCast(TorchDispatchMode):
    """Casting a tensor to a dtype again gives the storage of the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._done: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._to_copy.default:
            return out
        source: Tensor = args[0]
        key = (source.untyped_storage()._cdata, source.storage_offset(), source.numel(), out.dtype)
        first = self._done.setdefault(key, (out, source))[0]  # the source stays, and with it its address
        return out if first is out else first.view(out.shape)


def _run(
    model: LanguageModel,
    batch: int,
    context: int,
    precision: PrecisionName,
    *,
    device_type: str,
    compiled: bool,
) -> _Trace:
    """A training forward pass; one tensor stands for each storage that it saves, weights and buffers left out."""
    backend = moeut_kernels.backend()
    if device_type == "cuda":  # the fake tensors of the trace lie on the CPU
        backend = {"auto": "triton", "bmm": "grouped_mm"}.get(backend, backend)
    elif backend == "auto" and n_threads() >= LEAST_THREADS:
        backend = "bmm"  # what steps of few sequences take, and what keeps most
    with FakeTensorMode(), moeut_kernels.use_backend(backend):
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        trace = _Trace({_address(tensor) for tensor in weights.values()}, compiled=compiled)
        ids = torch.zeros(batch, context, dtype=torch.long)
        dtype = DTYPES.get(precision)
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, Layer):
                    stack.callback(module.register_forward_pre_hook(trace.enter).remove)
                    stack.callback(module.register_forward_hook(trace.leave).remove)
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # a real step warns of itself
            stack.enter_context(saved_tensors_hooks(trace.save, lambda tensor: tensor))
            stack.enter_context(
                torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
            )
            stack.enter_context(trace)
            if compiled:
                stack.enter_context(_OneCast())
            functional_call(model, weights, (ids,), {"targets": ids})
        return trace


class _Sizes:
    """Bytes of saved tensors as they will be on the device."""

    def __init__(self, spec: ModelSpec, batch: int, context: int, *, on_cuda: bool, compiled: bool) -> None:
        self._spec = spec
        self._batch = batch
        self._context = context
        self._compiled = compiled
        widths = {member.layer.mixer.d_head for member in spec.members()} if on_cuda else set()
        self._padded = {width: -(-width // _HEAD_ALIGNMENT) * _HEAD_ALIGNMENT for width in widths}
        self._n_streams = 0

    def of(self, tensor: Tensor) -> int:
        n_bytes = tensor.untyped_storage().nbytes()
        shape = tuple(tensor.shape)
        if tensor.ndim == 4 and shape[2] == self._context and tensor.dtype != torch.int64:
            return n_bytes * self._padded.get(shape[3], shape[3]) // shape[3]
        if not self._compiled or tensor.dtype != torch.float32:
            return n_bytes
        if shape == (self._batch, self._context, self._spec.d_model):
            self._n_streams += 1
            # the input of each layer and of the final norm stays as it is
            return n_bytes if self._n_streams <= self._spec.depth + 1 else n_bytes // 2
        is_softmax = tensor.ndim == 4 and shape[:2] == (self._batch, self._context)
        return n_bytes // 2 if is_softmax else n_bytes

    def masks(self) -> int:
        """One byte for each hidden channel of compiled dense feedforwards with ReLU."""
        if not self._compiled:
            return 0
        channels = 0
        for member in self._spec.members():
            feedforward = member.layer.feedforward
            if isinstance(feedforward, DenseSpec) and feedforward.activation == "relu":
                channels += member.applications * feedforward.d_ff
        return self._batch * self._context * channels
