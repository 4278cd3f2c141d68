"""Multiply-accumulates traced on the built module: the independent check of the closed form.

The model is built on the meta device, where nothing is allocated, and one pass is traced by fvcore. Shared layers are
counted once per call. Fused attention and the expert products are opaque to a tracer, so they have handles here; an
operator that multiplies and has no handle is an error, not a warning.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import addmm_flop_jit, bmm_flop_jit, linear_flop_jit, matmul_flop_jit
from torch import Tensor, nn

from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.spec.model import ModelSpec

Handle = Callable[[list[Any], list[Any]], int]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and values over all key positions, no causal halving."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _slots(inputs: list[Any], place: int) -> int:
    return math.prod(_shape(inputs[place]))


def _projection(inputs: list[Any], outputs: list[Any]) -> int:
    """`expert_split` and `expert_merge`: every slot of `index` meets one `[D, F]` expert."""
    _, d_in, d_out = _shape(inputs[1])
    return _slots(inputs, 5) * d_in * d_out


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Two operands: the product of all distinct dimensions."""
    left, right = inputs[0].toIValue().split("->")[0].split(",")
    tensors = list(inputs[1].node().inputs())
    sizes = dict(zip(left, _shape(tensors[0]), strict=True)) | dict(
        zip(right, _shape(tensors[1]), strict=True)
    )
    return math.prod(sizes.values())


def _feedforward(inputs: list[Any], outputs: list[Any]) -> int:
    """`expert_feedforward`: every slot meets one up and one down matrix."""
    up, down = _feedforward_weights(inputs)
    index = next(place for place, tensor in enumerate(inputs) if _is_index(tensor))
    return _slots(inputs, index) * (up[1] * up[2] + down[1] * down[2])


def _feedforward_weights(inputs: list[Any]) -> list[list[int]]:
    shapes = [_shape(value) for value in inputs if value.type().kind() == "TensorType"]
    return [shape for shape in shapes if len(shape) == 3][:2]


def _is_index(value: Any) -> bool:
    return (
        value.type().kind() == "TensorType"
        and value.type().dim() == 3
        and not value.type().dtype().is_floating_point
    )


HANDLES: dict[str, Handle] = {
    "aten::addmm": addmm_flop_jit,
    "aten::bmm": bmm_flop_jit,
    "aten::linear": linear_flop_jit,
    "aten::matmul": matmul_flop_jit,
    "aten::mm": matmul_flop_jit,
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
    "moeut::expert_split": _projection,
    "moeut::expert_merge": _projection,
    "moeut::expert_feedforward": _feedforward,
}
"""Every operator that multiplies. The handles of fvcore for norms are left out: norms are elementwise here."""

ELEMENTWISE = frozenset(
    """
    __and__ __lshift__ __or__ __rshift__ _softmax abs add add_ any arange argsort bincount bitwise_and
    bitwise_left_shift bitwise_or bitwise_right_shift cast cat clamp clamp_min copy_ cos cumsum detach div
    div_ embedding empty eq exp expand_as fill_ flatten floor_divide full full_like gather ge gelu gt histc
    index index_add index_select layer_norm le log log_softmax logical_and logsumexp lt masked_fill
    masked_fill_ masked_select max maximum mean min mul mul_ multinomial ne neg new_empty new_full new_ones
    new_zeros one_hot ones ones_like pad plan pow rand_like reciprocal relu remainder repeat
    repeat_interleave rms_norm rsqrt rsub scatter scatter_ scatter_add searchsorted select sigmoid silu sin
    softmax sort special_entr sqrt square stack sub sum tanh topk triu unflatten where zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Operators without matrix products: copies, comparisons, sums, activations. Nothing else may go uncounted."""


class UncountedOperator(Exception):
    """The model runs an operator that may multiply and that nobody taught us to count."""


@dataclass(frozen=True)
class TracedMacs:
    """Multiply-accumulates per token of one traced pass."""

    by_component: dict[str, int]
    by_module: dict[str, int]
    """Dotted module names with all they contain; the model itself is the empty name."""

    @property
    def total(self) -> int:
        return sum(self.by_component.values())


class _Logits(nn.Module):
    """The model as a function from tensor to tensor, which is what a tracer follows."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits
        assert logits is not None
        return logits


def trace_macs(spec: ModelSpec, seq_len: int | None = None) -> TracedMacs:
    """Count one token of `spec` in a sequence of `seq_len` (default: context length) on the built module.

    Raises UncountedOperator if an operator without a handle may multiply.
    """
    length = spec.context_length if seq_len is None else seq_len
    model = build_model(spec, device="meta").eval()
    analysis = FlopCountAnalysis(_Logits(model), (torch.zeros(1, length, dtype=torch.long, device="meta"),))
    analysis.clear_op_handles().set_op_handle(**HANDLES)
    counts = _run(analysis)
    components: Counter[str] = Counter()
    for name, module in model.named_modules():
        own = Counter(counts[_scoped(name)])
        for child, _ in module.named_children():
            own.subtract(counts[_scoped(f"{name}.{child}" if name else child)])
        for operator, macs in own.items():
            if macs:
                components[component_of(name, operator)] += macs
    return TracedMacs(
        by_component={name: _per_token(macs, length) for name, macs in components.items()},
        by_module={
            name: _per_token(sum(counts[_scoped(name)].values()), length)
            for name, _ in model.named_modules()
            if sum(counts[_scoped(name)].values())
        },
    )


def count_built_params(spec: ModelSpec) -> dict[str, int]:
    """Parameters of the built module by component, counted by fvcore: the check of `params_by_component`."""
    model = build_model(spec, device="meta")
    counts = parameter_count(model)
    components: Counter[str] = Counter()
    for name, _ in model.named_parameters():
        components[_param_component(name)] += counts[name]
    assert sum(components.values()) == counts[""]
    return dict(components)


def _param_component(name: str) -> str:
    parts = name.split(".")
    if parts[-1].startswith("lora_"):
        return "lora"
    owner = parts[4] if parts[2:3] == ["layers"] else parts[2] if parts[0] == "stages" else parts[0]
    return "norm" if owner.endswith("_norm") else "head" if owner == "tied_bias" else owner


def _scoped(name: str) -> str:
    return f"model.{name}" if name else "model"


def _per_token(macs: float, length: int) -> int:
    per_token, rest = divmod(round(macs), length)
    assert rest == 0, f"{macs} multiply-accumulates do not divide by {length} tokens"
    return per_token


def _run(analysis: FlopCountAnalysis) -> dict[str, Counter[str]]:
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = analysis.by_module_and_operator()
    unknown = {name for name in analysis.unsupported_ops() if name.split("::")[-1] not in ELEMENTWISE}
    if unknown:
        raise UncountedOperator(
            f"operators without a multiply-accumulate formula: {', '.join(sorted(unknown))}"
        )
    return counts


def component_of(module: str, operator: str) -> str:
    """The component of the closed form that a product belongs to, from the innermost module that runs it."""
    parts = module.split(".")
    if "halting" in parts:
        return "act_gate"
    if "injection" in parts:
        return "injection"
    if "feedforward" in parts:
        return "ffn_select" if "router" in parts else "ffn"
    if "mixer" in parts:
        if any(part.endswith("router") for part in parts):
            return "attn_select"
        return {"scaled_dot_product_attention": "attn_scores_values", "matmul": "attn_relpos"}.get(
            operator, "attn_proj"
        )
    assert parts[0] in ("", "head"), f"{operator} in {module!r} belongs to no component"
    return "lm_head"
