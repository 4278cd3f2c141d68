"""How fast text is written: prompts read at once, then one token of every sequence after the other.

The bound is that of memory traffic alone: the weights that a step touches, each application's read anew, and the keys
and values that it sees, over the memory bandwidth of the device's data sheet. Which experts several tokens touch is
expected, not counted: of E experts with K choices a token, N tokens touch E (1 - (1 - K/E)^N).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moeut_compose.blocks.feedforwards import ExpertFeedForward
from moeut_compose.blocks.layers import Layer
from moeut_compose.blocks.linear import Linear
from moeut_compose.blocks.mixers import MixtureOfAttention, SwitchHead
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.roles import Router
from moeut_compose.blocks.stages import Stage
from moeut_compose.build import build_model
from moeut_compose.generate.graph import GraphDecoder
from moeut_compose.generate.sampling import Sampling
from moeut_compose.measure.hardware import memory_bandwidth
from moeut_compose.progress import Reporter
from moeut_compose.spec.model import ModelSpec
from moeut_compose.train.device import describe_device

N_CHUNKS = 8
"""Timed pieces; the median counts."""

WARM_UP = 8
"""Tokens before them."""


@dataclass(frozen=True)
class DecodeTiming:
    """Times of reading prompts and of writing, for one batch."""

    name: str
    device: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    is_fused: bool
    """Whether kernels for a few tokens ran, or the modules themselves."""
    is_graphed: bool
    prefill_ms: float
    prefill_tokens_per_second: float
    step_ms: float
    """Median; one token of every sequence."""
    step_ms_low: float
    step_ms_high: float
    tokens_per_second: float
    weight_bytes: float
    """Expected bytes of weights that a step touches."""
    cache_bytes: float
    """Keys and values that a step reads, in the middle of the measurement."""
    bound_tokens_per_second: float | None
    """None where the memory bandwidth of the device is not known."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_decode(
    spec: ModelSpec,
    *,
    batches: list[int],
    prompt_tokens: int,
    new_tokens: int,
    device: torch.device,
    sampling: Sampling,
    fused: bool = True,
    reporter: Reporter | None = None,
    profile: Callable[[int, Any], None] | None = None,
) -> list[DecodeTiming]:
    """Build `spec` with random weights and time each batch size; prompts are random tokens.

    `profile` is handed the batch and a finished `torch.profiler.profile` of four further tokens.
    """
    model = build_model(spec, device=device).eval()
    decoder = GraphDecoder(model, fused=fused, reporter=reporter)
    timings = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(spec.vocab_size, (batch, prompt_tokens), generator=generator).tolist()

        def begin(prompts: list[list[int]] = prompts, batch: int = batch) -> None:
            decoder.begin(prompts, max_new_tokens=new_tokens, sampling=sampling, seeds=range(batch))

        begin()  # records the step
        prefill = statistics.median(_timed(begin, device) for _ in range(3))
        decoder.advance(WARM_UP)
        size = max(1, (new_tokens - WARM_UP - 1) // N_CHUNKS)
        steps = [_timed(lambda size=size: decoder.advance(size), device) / size for _ in range(N_CHUNKS)]  # type: ignore[misc]
        if profile is not None:
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profiler:
                decoder.advance(4)
                _synchronize(device)
            profile(batch, profiler)
        step = statistics.median(steps)
        n_bytes = decoder.dtype.itemsize
        weights = touched_weights(model, batch) * n_bytes
        cache = batch * (prompt_tokens + new_tokens / 2) * cached_numbers(model) * n_bytes
        bandwidth = memory_bandwidth(describe_device(device))
        timings.append(
            DecodeTiming(
                name=spec.name,
                device=describe_device(device),
                dtype=str(decoder.dtype).removeprefix("torch."),
                batch=batch,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                is_fused=decoder.is_fused,
                is_graphed=device.type == "cuda",
                prefill_ms=prefill,
                prefill_tokens_per_second=1e3 * batch * prompt_tokens / prefill,
                step_ms=step,
                step_ms_low=min(steps),
                step_ms_high=max(steps),
                tokens_per_second=1e3 * batch / step,
                weight_bytes=weights,
                cache_bytes=cache,
                bound_tokens_per_second=None if bandwidth is None else batch * bandwidth / (weights + cache),
            )
        )
    return timings


def touched_weights(model: LanguageModel, n_tokens: int) -> float:
    """Weights that a step of `n_tokens` is expected to read, those of a shared layer as often as it runs."""
    d_model = model.embedding.embedding_dim
    head = model.embedding.weight.numel() if model.head is None else _numel(model.head)
    total = float(head + _numel(model.final_norm) + n_tokens * d_model)
    for stage in _stages(model):
        layers = [_layer_weights(layer, n_tokens) for layer in _members(stage)]
        passes = 1 + max(repeat for _, repeat in stage.schedule)
        own = _numel(stage.halting) + _numel(stage.injection)
        total += passes * own + sum(layers[member] for member, _ in stage.schedule)
    return total


def cached_numbers(model: LanguageModel) -> int:
    """Numbers that all caches keep for one position."""
    total = 0
    for stage in _stages(model):
        members = _members(stage)
        for member, _ in stage.schedule:
            key = members[member].mixer.get_submodule("key")
            assert isinstance(key, Linear)
            total += 2 * key.out_features
    return total


def _stages(model: LanguageModel) -> list[Stage]:
    return [stage for stage in model.stages if isinstance(stage, Stage)]


def _members(stage: Stage) -> list[Layer]:
    return [layer for layer in stage.layers if isinstance(layer, Layer)]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_weights(layer: Layer, n_tokens: int) -> float:
    total = float(_numel(layer))
    for part in (layer.mixer, layer.feedforward):
        match part:
            case SwitchHead():
                router: Router = part.output_router
            case MixtureOfAttention() | ExpertFeedForward():
                router = part.router
            case _:
                continue
        top_k = int(getattr(router, "top_k", router.n_experts))
        untouched = (1 - top_k / router.n_experts) ** n_tokens
        total -= untouched * sum(weight.numel() for weight in part.expert_weights().values())
    return total


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds by the wall clock, until the device has finished."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - started)
