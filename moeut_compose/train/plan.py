"""What a training run will be, in numbers, before any data is touched."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from moeut_compose.measure.hardware import FLOPS_PER_MAC
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.train.device import choose_device, choose_precision, describe_device, free_memory
from moeut_compose.train.errors import TrainError
from moeut_compose.train.memory import MemoryEstimate, choose_micro_batch, estimate_memory, trace_activations
from moeut_compose.train.schedule import lr_at

if TYPE_CHECKING:
    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.device import PrecisionName
    from moeut_compose.train.recompute import ActivationCheckpointing

_CPU_EFFICIENCY = 0.35
"""Share of the speed of a large matrix product that a training step reaches on a CPU."""
_CURVE_POINTS = 48


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of a run."""

    architecture: str
    recipe: str
    device: str
    device_name: str
    precision: PrecisionName
    params: int
    active_params: int
    macs_per_token: int
    context: int
    batch_size: int
    n_processes: int
    process_batch: int
    """Sequences of a batch that each process takes."""
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    steps: int
    tokens: int
    activation_checkpointing: ActivationCheckpointing
    memory: MemoryEstimate
    memory_selective: MemoryEstimate
    """The same micro-batch with selective activation checkpointing."""
    memory_checkpointed: MemoryEstimate
    """The same micro-batch with full activation checkpointing."""
    free_memory: int | None
    """Bytes free on the device now; None where the system does not tell."""
    lr_curve: list[tuple[int, float]]
    """Learning rate before some 0-based steps, first and last included."""
    seconds: float | None
    """Expected duration of the training steps; None on devices whose speed is not known beforehand."""
    notes: list[str]
    """What a person should know before starting."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("memory", "memory_selective", "memory_checkpointed")
        estimates: dict[str, MemoryEstimate] = {name: getattr(self, name) for name in names}
        return asdict(self) | {name: memory.to_dict() for name, memory in estimates.items()}


def plan_training(
    spec: ModelSpec, recipe: RecipeSpec, *, device: str | torch.device = "auto", n_processes: int = 1
) -> TrainingPlan:
    """Work out a run of `n_processes`, without data or weights.

    Raises `TrainError` if recipe, architecture and processes do not fit.
    """
    place = choose_device(device)
    precision = choose_precision(recipe.precision, place).name
    context = context_of(spec, recipe)
    steps = recipe.num_steps(context)
    params = count_params(spec)
    activations = trace_activations(
        spec, context, precision, device_type=place.type, compiled=recipe.compile is True
    )
    free = free_memory(place)
    process_batch = _process_batch(recipe.batch.size, n_processes)
    micro = process_batch
    if recipe.batch.micro != "auto":
        micro = min(recipe.batch.micro, process_batch)
    else:
        micro = choose_micro_batch(
            process_batch,
            activations=activations.checkpointed(recipe.activation_checkpointing),
            n_params=params.total,
            context=context,
            device=place,
            free=free,
        )
    modes: tuple[ActivationCheckpointing, ...] = (recipe.activation_checkpointing, "selective", "full")
    memory, selective, checkpointed = (
        estimate_memory(
            params.total, activations.checkpointed(mode), micro, accumulates=micro < recipe.batch.size
        )
        for mode in modes
    )
    tokens_per_step = recipe.batch.size * context
    macs = count_macs(spec, context).total_per_token
    seconds = None
    if place.type == "cpu":
        seconds = steps * tokens_per_step * macs * FLOPS_PER_MAC / (measure_cpu_flops() * _CPU_EFFICIENCY)
    return TrainingPlan(
        architecture=spec.name,
        recipe=recipe.name,
        device=str(place),
        device_name=describe_device(place),
        precision=precision,
        params=params.total,
        active_params=params.active_per_token,
        macs_per_token=macs,
        context=context,
        batch_size=recipe.batch.size,
        n_processes=n_processes,
        process_batch=process_batch,
        micro_batch=micro,
        accumulation=-(-process_batch // micro),
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        activation_checkpointing=recipe.activation_checkpointing,
        memory=memory,
        memory_selective=selective,
        memory_checkpointed=checkpointed,
        free_memory=free,
        lr_curve=lr_curve(recipe, steps),
        seconds=seconds,
        notes=_notes(recipe, steps, tokens_per_step, memory, free),
    )


def _process_batch(size: int, n_processes: int) -> int:
    if size % n_processes:
        near = [n for n in (size // n_processes * n_processes, -(-size // n_processes) * n_processes) if n]
        raise TrainError(
            f"recipe.batch.size={size} cannot be split evenly over {n_processes} processes; "
            f"set recipe.batch.size={' or '.join(map(str, near))}"
        )
    return size // n_processes


def context_of(spec: ModelSpec, recipe: RecipeSpec) -> int:
    """Tokens of a training window. Raises `TrainError` if the recipe asks for more than there are."""
    context = recipe.context or spec.context_length
    if context > spec.context_length:
        raise TrainError(
            f"recipe.context={context} exceeds the architecture's context_length={spec.context_length}; "
            f"lower it, or set context_length={context}"
        )
    return context


def lr_curve(recipe: RecipeSpec, steps: int) -> list[tuple[int, float]]:
    """The learning rate at evenly spread steps, at the end of the warm-up, and at the last step."""
    wanted = {round(i * (steps - 1) / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)}
    if recipe.schedule.warmup_steps < steps:
        wanted.add(recipe.schedule.warmup_steps)
    lr = recipe.optimizer.lr
    return [(step, lr_at(step, recipe.schedule, lr, steps=steps)) for step in sorted(wanted)]


def measure_cpu_flops(size: int = 768) -> float:
    """Speed of a float32 matrix product on this CPU, in FLOP/s; takes about a tenth of a second."""
    a = torch.ones(size, size)
    torch.mm(a, a)
    start = time.perf_counter()
    n = 0
    while time.perf_counter() - start < 0.1:
        torch.mm(a, a)
        n += 1
    return 2 * size**3 * n / (time.perf_counter() - start)


def _notes(
    recipe: RecipeSpec, steps: int, tokens_per_step: int, memory: MemoryEstimate, free: int | None
) -> list[str]:
    notes = []
    if recipe.schedule.warmup_steps >= steps:
        notes.append(
            f"the warm-up ({recipe.schedule.warmup_steps} steps) is not shorter than the run "
            f"({steps} steps), so the peak learning rate is not held; set schedule.warmup_steps"
        )
    limit = recipe.data.max_tokens
    if limit is not None and steps * tokens_per_step > limit:
        notes.append(
            f"{steps * tokens_per_step:,} training tokens repeat the {limit:,} tokens of data.max_tokens"
        )
    if free is not None and memory.total > free:
        notes.append(
            f"the step needs about {memory.total / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "it may not fit"
        )
    return notes
