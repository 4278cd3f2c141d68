"""What a forward pass keeps for its backward pass, tensor by tensor.

The step is run on fake tensors: shapes and dtypes without memory, autocast and our operators included. Autograd says
what it saves. What compiled layers save instead follows by four rules, which the partitioner of `torch.compile` obeys:

- a tensor that several products read is cast once (eager mode casts for each of them);
- inside a layer, the output of a block is kept in the dtype of products, and the residual sum formed again;
- a router keeps its scores instead of their float32 softmax;
- the backward of ReLU in a dense feedforward reads a mask of one byte.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import moeut_kernels
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from moeut_compose.build import build_model
from moeut_compose.spec.feedforwards import DenseSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.train.device import PrecisionName

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD_ALIGNMENT = 8
"""Fused attention on CUDA pads heads to a multiple of this many channels."""


@dataclass(frozen=True)
class Kept:
    """Bytes: `fixed` whatever the batch, copies of weights above all; `per_sequence` for each sequence."""

    fixed: int
    per_sequence: int
    per_sequence_checkpointed: int
    """With full activation checkpointing: the inputs of all layer applications, and one of these run again."""


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

    def measure(batch: int) -> int:
        saved = _saved(model, batch, context, precision, device_type=device_type, merges_casts=compiled)
        sizes = _Sizes(spec, batch, context, on_cuda=device_type == "cuda", compiled=compiled)
        return sum(sizes.of(tensor) for tensor in saved) + sizes.masks()

    two, three = measure(2), measure(3)  # one alone is special: what is transposed there is not copied
    per_sequence = three - two
    fixed = max(0, two - 2 * per_sequence)
    inputs = 4 * context * spec.d_model * (spec.depth + 1)
    again = max(0, per_sequence - inputs) // spec.depth
    return Kept(fixed, per_sequence, min(per_sequence, inputs + again))


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


def _saved(
    model: LanguageModel,
    batch: int,
    context: int,
    precision: PrecisionName,
    *,
    device_type: str,
    merges_casts: bool,
) -> list[Tensor]:
    """One tensor for each storage that a training forward pass saves, weights and buffers left out."""
    kept: dict[int, Tensor] = {}
    own: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    backend = moeut_kernels.backend()
    if backend == "auto" and device_type == "cuda":
        backend = "triton"  # the fake tensors of the trace lie on the CPU
    with FakeTensorMode(), moeut_kernels.use_backend(backend):
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        own.update(tensor.untyped_storage()._cdata for tensor in weights.values())
        ids = torch.zeros(batch, context, dtype=torch.long)
        dtype = _DTYPES.get(precision)
        with (
            warnings.catch_warnings(action="ignore"),  # of dtypes that a real step warns of itself
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            if merges_casts:
                with _OneCast():
                    functional_call(model, weights, (ids,), {"targets": ids})
            else:
                functional_call(model, weights, (ids,), {"targets": ids})
        return list(kept.values())


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
