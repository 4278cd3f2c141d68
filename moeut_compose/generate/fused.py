"""One token of every sequence through a whole model by the kernels for a few tokens.

Weights are cast once and packed: queries, keys, dense values and both attention routers are rows of one product. The
residual stream stays in float32, and so do scores, gates and attention weights. Covered are models whose layers are
attention or SwitchHead, with a dense feedforward or a sigma-MoE, norms before the blocks (pre or peri), rotary
positions or none, and no halting; `packed` says so. For all others the modules themselves run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from moeut_kernels import decode
from torch import Tensor, nn
from torch.nn import functional

from moeut_compose.blocks.feedforwards import DenseFeedForward, ExpertFeedForward, activate
from moeut_compose.blocks.halting import NoHalting
from moeut_compose.blocks.layers import PeriNormLayer, PreNormLayer
from moeut_compose.blocks.loops import NoInjection, NoStep
from moeut_compose.blocks.mixers import Attention, SwitchHead
from moeut_compose.blocks.norms import LayerNorm, RMSNorm
from moeut_compose.blocks.positions import NoPosition, Rope
from moeut_compose.blocks.routers import SigmoidRouter
from moeut_compose.blocks.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.blocks.cache import Memory
    from moeut_compose.blocks.linear import Linear
    from moeut_compose.blocks.model import LanguageModel

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedMixer:
    """Attention or SwitchHead. `product [R, D]`: queries, keys, then dense values or routers of values and outputs."""

    n_heads: int
    d_head: int
    n_experts: int
    """0: dense."""
    top_k: int
    product: Tensor
    value: Tensor | None
    output: Tensor
    rope: Rope | None

    def step(
        self, x: Tensor, columns: Tensor, memory: Memory, position: Tensor, tables: Tables | None
    ) -> Tensor:
        """Addends `[P, N, D]` for tokens whose values are read from `x [N, D]`."""
        width = self.n_heads * self.d_head
        heads = (self.n_heads, self.d_head)
        query, key = (columns[:, at : at + width].unflatten(1, heads) for at in (0, width))
        if self.value is None:
            values, chosen = columns[:, 2 * width :].unflatten(1, heads)[None], None
        else:
            logits = columns[:, 2 * width :].unflatten(1, (2, self.n_heads, self.n_experts))
            chosen = logits[:, 1]
            values = decode.expert_values(x, logits[:, 0], self.value, self.top_k)
        attended = decode.attend(query, key, values, memory, position, tables)
        return decode.expert_outputs(attended, chosen, self.output, self.top_k)


@dataclass(frozen=True)
class PackedExperts:
    """A sigma-MoE; `product` is its router."""

    product: Tensor
    up: Tensor
    down: Tensor
    top_k: int
    activation: str

    @property
    def bias(self) -> None:
        return None

    def step(self, x: Tensor, columns: Tensor) -> Tensor:
        return decode.expert_feedforward(x, columns, self.up, self.down, self.top_k, self.activation)


@dataclass(frozen=True)
class PackedDense:
    """A dense feedforward; `product` is its up projection."""

    product: Tensor
    bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str

    def step(self, x: Tensor, columns: Tensor) -> Tensor:
        hidden = activate(columns, self.activation).to(self.down.dtype)  # type: ignore[arg-type]
        return functional.linear(hidden, self.down, self.down_bias).float()[None]


@dataclass(frozen=True)
class PackedLayer:
    """One application: the weights are shared, the norms may be its own."""

    mixer: PackedMixer
    feedforward: PackedExperts | PackedDense
    mixer_norm: decode.Norm
    feedforward_norm: decode.Norm
    is_peri: bool

    def step(
        self, x: Tensor, pending: Tensor | None, memory: Memory, position: Tensor, tables: Tables | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream `[N, D]` and what is to be added to it, `[P, N, D]`, after the layer."""
        mixer, feedforward = self.mixer, self.feedforward
        before = decode.norm_project(x, pending, self.mixer_norm, mixer.product)
        source = before.data if self.is_peri else before.normed
        pending = mixer.step(source, before.product, memory, position, tables)
        between = decode.norm_project(
            before.total, pending, self.feedforward_norm, feedforward.product, feedforward.bias
        )
        source = between.data if self.is_peri else between.normed
        return between.total, feedforward.step(source, between.product)


class FusedModel:
    """A model packed for decoding, see `packed`."""

    def __init__(
        self, model: LanguageModel, layers: Sequence[PackedLayer], norm: decode.Norm, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._layers = layers
        self._norm = norm
        weight, bias = (
            (model.embedding.weight, model.tied_bias)
            if model.head is None
            else (model.head.weight, model.head.bias)
        )
        self._head = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().float()
        self._tables: dict[Rope, Tables] = {}

    def make_room(self, room: int) -> None:
        """Prepare for positions below `room`; to be called before `step`, outside of a recorded graph."""
        for layer in self._layers:
            if (rope := layer.mixer.rope) is not None:
                self._tables[rope] = rope.angles(torch.arange(room, device=rope.cos.device))

    def step(self, tokens: Tensor, position: Tensor, memories: Sequence[Memory]) -> Tensor:
        """Logits `[N, V]` in float32 after `tokens [N]` at `position [N]`; keys and values go into `memories`."""
        model = self._model
        x = functional.embedding(tokens, model.embedding.weight).float()
        x = model.embedding_norm(x if model.embedding_scale == 1.0 else x * model.embedding_scale)
        pending: Tensor | None = None
        for layer, memory in zip(self._layers, memories, strict=True):
            rope = layer.mixer.rope
            x, pending = layer.step(
                x, pending, memory, position, None if rope is None else self._tables[rope]
            )
        return decode.norm_project(x, pending, self._norm, self._head, self._bias).product


@torch.no_grad()
def packed(model: LanguageModel, dtype: torch.dtype) -> FusedModel | None:
    """`model` with its weights in `dtype` and packed, or None where something in it is not covered."""
    final = _norm(model.final_norm, 0)
    if final is None:
        return None
    layers: list[PackedLayer] = []
    for stage in model.stages:
        assert isinstance(stage, Stage)
        if type(stage.halting) is not NoHalting or type(stage.injection) is not NoInjection:
            return None
        if type(stage.step) is not NoStep:
            return None
        members = [_Member.of(layer, dtype) for layer in stage.layers]
        for member, repeat in stage.schedule:
            layer = members[member]
            packed_layer = None if layer is None else layer.application(repeat)
            if packed_layer is None:
                return None
            layers.append(packed_layer)
    return FusedModel(model, layers, final, dtype)


@dataclass(frozen=True)
class _Member:
    """A layer with its weights packed, whatever its applications are."""

    layer: PreNormLayer | PeriNormLayer
    mixer: PackedMixer
    feedforward: PackedExperts | PackedDense

    @staticmethod
    def of(layer: nn.Module, dtype: torch.dtype) -> _Member | None:
        if not isinstance(layer, PreNormLayer | PeriNormLayer):
            return None
        mixer, feedforward = _mixer(layer.mixer, dtype), _feedforward(layer.feedforward, dtype)
        return None if mixer is None or feedforward is None else _Member(layer, mixer, feedforward)

    def application(self, repeat: int) -> PackedLayer | None:
        norms = _norm(self.layer.mixer_norm, repeat), _norm(self.layer.feedforward_norm, repeat)
        if norms[0] is None or norms[1] is None:
            return None
        return PackedLayer(
            self.mixer, self.feedforward, norms[0], norms[1], isinstance(self.layer, PeriNormLayer)
        )


def _norm(norm: nn.Module, repeat: int) -> decode.Norm | None:
    if not isinstance(norm, LayerNorm | RMSNorm):
        return None

    def of_pass(weight: Tensor) -> Tensor:
        return (weight if weight.dim() == 1 else weight[repeat]).detach().float().contiguous()

    if isinstance(norm, LayerNorm):
        return decode.Norm("layer", of_pass(norm.weight), of_pass(norm.bias), norm.eps)
    return decode.Norm("rms", of_pass(norm.weight), None, norm.eps)


def _rows(*weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([weight.detach().to(dtype) for weight in weights])


def _is_plain(*linears: Linear) -> bool:
    return all(linear.lora_down is None for linear in linears)


def _mixer(mixer: nn.Module, dtype: torch.dtype) -> PackedMixer | None:
    if not isinstance(mixer, Attention | SwitchHead) or not _is_plain(mixer.query, mixer.key):
        return None
    if not isinstance(mixer.position, Rope | NoPosition):
        return None
    rope = mixer.position if isinstance(mixer.position, Rope) and mixer.position.n_rotated else None
    d_head = mixer.query.weight.shape[0] // mixer.n_heads
    if d_head > decode.MOST_WIDTH:
        return None
    if isinstance(mixer, Attention):
        if not _is_plain(mixer.value, mixer.output):
            return None
        product = _rows(mixer.query.weight, mixer.key.weight, mixer.value.weight, dtype=dtype)
        output = mixer.output.weight.detach().to(dtype).t().reshape(mixer.n_heads, d_head, -1).contiguous()
        return PackedMixer(mixer.n_heads, d_head, 0, 0, product, None, output, rope)
    of_values, of_outputs = mixer.value_router, mixer.output_router
    if not isinstance(of_values, SigmoidRouter) or not isinstance(of_outputs, SigmoidRouter):
        return None
    product = _rows(mixer.query.weight, mixer.key.weight, of_values.weight, of_outputs.weight, dtype=dtype)
    value, output = (weight.detach().to(dtype) for weight in (mixer.value, mixer.output))
    return PackedMixer(mixer.n_heads, d_head, mixer.n_experts, of_outputs.top_k, product, value, output, rope)


def _feedforward(feedforward: nn.Module, dtype: torch.dtype) -> PackedExperts | PackedDense | None:
    if isinstance(feedforward, DenseFeedForward):
        if not _is_plain(feedforward.up, feedforward.down):
            return None
        biases = [
            None if part.bias is None else part.bias.detach() for part in (feedforward.up, feedforward.down)
        ]
        return PackedDense(
            feedforward.up.weight.detach().to(dtype),
            biases[0],
            feedforward.down.weight.detach().to(dtype),
            None if biases[1] is None else biases[1].to(dtype),
            feedforward.activation,
        )
    if not isinstance(feedforward, ExpertFeedForward) or not isinstance(feedforward.router, SigmoidRouter):
        return None
    if feedforward.up_bias is not None or feedforward.shared is not None:
        return None
    if feedforward.down.shape[1] > decode.MOST_WIDTH:
        return None
    router = feedforward.router
    rows, up, down = (
        weight.detach().to(dtype) for weight in (router.weight, feedforward.up, feedforward.down)
    )
    return PackedExperts(rows, up, down, router.top_k, feedforward.activation)
