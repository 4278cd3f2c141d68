"""How long a whole training step takes: forward, backward, clipping, optimiser.

The step is the one that `train` takes. Tokens are random and rotate over several batches. On CUDA events serve,
those of one candidate read when all its steps are through, and the allocator's peak; elsewhere the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import moeut_kernels as mk
import torch
from moeut_kernels.bench.loop import LOOPS, loop_over_experts

from moeut_compose.build import build_model
from moeut_compose.measure.macs import count_macs
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import AdamWSpec, CosineSchedule
from moeut_compose.train.device import Precision, choose_precision, describe_device
from moeut_compose.train.loop import Trainer
from moeut_compose.train.memory import MemoryEstimate, estimate_memory, trace_activations
from moeut_compose.train.modes import compile_layers
from moeut_compose.train.parallel import Parallelism, spread
from moeut_compose.world import World

N_BATCHES = 3

BACKENDS = (*mk.BACKENDS, *LOOPS)
"""What can compute the expert products of a step: a back end of the kernels, or a loop over experts."""


@dataclass(frozen=True)
class StepTiming:
    """Times of one training step; `model_tflops` counts three forward passes of exact MACs, two FLOPs each."""

    name: str
    device: str
    n_processes: int
    batch: int
    """Sequences of a step on each process."""
    seq_len: int
    micro_batch: int
    precision: str
    compiled: bool
    graphed: bool
    ms: float
    """Median over the measured steps."""
    ms_low: float
    ms_high: float
    tokens_per_second: float
    model_tflops: float
    peak_gib: float | None
    """The most that the allocator counted."""
    estimated_gib: float
    """What was expected to be counted: replays of a graph come after its count, so they leave the optimiser out."""
    first_step_seconds: float
    loss: float
    backend: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_step(
    spec: ModelSpec,
    *,
    batch: int,
    seq_len: int,
    micro_batch: int | None = None,
    device: torch.device,
    compiled: bool,
    graphed: bool = False,
    steps: int = 15,
    warmup: int = 5,
    profile: Callable[[Any], None] | None = None,
    world: World | None = None,
    parallelism: Parallelism = "ddp",
) -> StepTiming:
    """Build `spec` on `device` and time training steps on random tokens `[batch, seq_len + 1]`.

    Of several processes each takes `batch` sequences; the figures are those of all of them, but for memory.
    They compile inside `uncut_layers`. `profile` is handed a finished `torch.profiler.profile` of two further steps.
    """
    world = world or World()
    micro_batch = micro_batch or batch
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = _trainer(
        spec, micro_batch, device, compiled=compiled, graphed=graphed, world=world, parallelism=parallelism
    )
    batches = _batches(spec, batch, seq_len, device, seed=world.rank)
    started = time.monotonic()
    trainer.train_step(batches[0])
    _synchronize(device)
    first = time.monotonic() - started
    for index in range(warmup):
        trainer.train_step(batches[index % N_BATCHES])
    _synchronize(device)
    times, loss = _steps_in_a_row(trainer, batches, steps, device)
    if profile is not None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for index in range(2):
                trainer.train_step(batches[index])
            _synchronize(device)
        profile(profiler)
    timing = _timing(
        spec,
        times,
        batch,
        seq_len,
        micro_batch,
        device,
        compiled=compiled,
        graphed=graphed,
        n_processes=world.size,
    )
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return replace(timing, peak_gib=peak, first_step_seconds=first, loss=loss)


def measure_in_turn(
    specs: Sequence[ModelSpec],
    backends: Sequence[str],
    *,
    batch: int,
    seq_len: int | None,
    micro_batch: int | None = None,
    device: torch.device,
    steps: int = 15,
    warmup: int = 2,
) -> list[StepTiming]:
    """Time eager steps of every spec on every one of `backends`, one step of each a round.

    What else the machine does then strikes all alike. All models are in memory at once, so no peak is reported.
    seq_len: None for the context length of each.
    """
    candidates = [(spec, backend) for spec in specs for backend in backends]
    trainers = [_trainer(spec, micro_batch or batch, device) for spec, _ in candidates]
    batches = [_batches(spec, batch, seq_len or spec.context_length, device) for spec, _ in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    firsts, losses = [0.0] * len(candidates), [float("nan")] * len(candidates)
    for round_number in range(warmup + steps):
        for place, (_, backend) in enumerate(candidates):
            tokens = batches[place][round_number % N_BATCHES]
            with loop_over_experts(backend) if backend in LOOPS else mk.use_backend(backend):
                elapsed, values = _timed(partial(trainers[place].train_step, tokens), device)
            losses[place] = float(values["loss"])
            if round_number == 0:
                firsts[place] = elapsed / 1e3
            if round_number >= warmup:
                times[place].append(elapsed)
    timings = []
    for place, (spec, backend) in enumerate(candidates):
        length = seq_len or spec.context_length
        timing = _timing(spec, times[place], batch, length, micro_batch or batch, device)
        timings.append(replace(timing, backend=backend, first_step_seconds=firsts[place], loss=losses[place]))
    return timings


def _trainer(
    spec: ModelSpec,
    micro_batch: int,
    device: torch.device,
    *,
    compiled: bool = False,
    graphed: bool = False,
    world: World | None = None,
    parallelism: Parallelism = "ddp",
) -> Trainer:
    model = build_model(spec, device=device)
    engine = spread(model, world or World(), parallelism, graphed=graphed)
    if compiled:
        compile_layers(model)
    return Trainer(
        model,
        optimizer=AdamWSpec(),
        schedule=CosineSchedule(warmup_steps=0, period=100_000),
        steps=100_000,
        clip_norm=0.25,
        precision=choose_precision("auto", device),
        micro_batch=micro_batch,
        graphed=graphed,
        world=world,
        engine=engine,
    )


def _batches(
    spec: ModelSpec, batch: int, seq_len: int, device: torch.device, *, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, spec.vocab_size, (batch, seq_len + 1), generator=generator).to(device)
        for _ in range(N_BATCHES)
    ]


def _timing(
    spec: ModelSpec, times: list[float], batch: int, seq_len: int, micro_batch: int, device: torch.device, *,
    compiled: bool = False, graphed: bool = False, n_processes: int = 1,
) -> StepTiming:  # fmt: skip
    """What follows from the times; the caller fills in the rest."""
    precision = choose_precision("auto", device)
    ms, tokens = statistics.median(times), n_processes * batch * seq_len
    estimate = _estimate(spec, seq_len, batch, micro_batch, precision, compiled=compiled)
    macs = count_macs(spec, seq_len).total_per_token
    return StepTiming(
        name=spec.name,
        device=describe_device(device),
        n_processes=n_processes,
        batch=batch,
        seq_len=seq_len,
        micro_batch=micro_batch,
        precision=precision.name,
        compiled=compiled,
        graphed=graphed,
        ms=ms,
        ms_low=min(times),
        ms_high=max(times),
        tokens_per_second=1e3 * tokens / ms,
        model_tflops=6e-9 * macs * tokens / ms,
        peak_gib=None,
        estimated_gib=(estimate.peak - (estimate.optimizer if graphed else 0)) / 2**30,
        first_step_seconds=float("nan"),
        loss=float("nan"),
    )


def _estimate(
    spec: ModelSpec, seq_len: int, batch: int, micro_batch: int, precision: Precision, *, compiled: bool
) -> MemoryEstimate:
    activations = trace_activations(
        spec, seq_len, precision.name, device_type=precision.device_type, compiled=compiled
    )
    return estimate_memory(spec.num_params(), activations, micro_batch, accumulates=micro_batch < batch)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps_in_a_row(
    trainer: Trainer, batches: list[torch.Tensor], steps: int, device: torch.device
) -> tuple[list[float], float]:
    """Milliseconds of each step, and the loss of the last. The host may run ahead, as it does in training."""
    if device.type != "cuda":
        timed = [_timed(partial(trainer.train_step, batches[i % N_BATCHES]), device) for i in range(steps)]
        return [elapsed for elapsed, _ in timed], float(timed[-1][1]["loss"])
    stream = torch.cuda.current_stream(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record(stream)
    for index in range(steps):
        values = trainer.train_step(batches[index % N_BATCHES])
        marks[index + 1].record(stream)
    marks[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)], float(values["loss"])


def _timed(
    step: Callable[[], dict[str, torch.Tensor]], device: torch.device
) -> tuple[float, dict[str, torch.Tensor]]:
    """Milliseconds of one step, and what it returned."""
    if device.type != "cuda":
        started = time.perf_counter()
        values = step()
        return 1e3 * (time.perf_counter() - started), values
    stream = torch.cuda.current_stream(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    values = step()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end), values
