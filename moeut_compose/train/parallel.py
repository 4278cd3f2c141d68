"""How several processes share the work on one model, with the engines of PyTorch.

Each process takes an equal part of every batch, so the mean over processes is the mean over the batch. A trainer asks
three things of an engine: what to call, what to do around the backward pass of a micro-batch, and what is left to do
when the last one is through.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moeut_compose.blocks.stages import Stage
from moeut_compose.world import translated

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.world import World

Parallelism = Literal["ddp", "fsdp"]

SMALLEST_UNIT = 256 * 2**20
"""Bytes of weights that a unit holds at least, if its stage has as many: it costs the host milliseconds a step."""


class Engine:
    """One process that has the model for itself."""

    def __init__(self, model: LanguageModel) -> None:
        self.forward: nn.Module = model

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients travel with the last of a step."""
        return nullcontext()

    def finish_backward(self) -> None:
        """After the last micro-batch of a step: makes gradients those of the whole batch."""


class Replicas(Engine):
    """Every process holds all weights and averages gradients while it computes them (DistributedDataParallel)."""

    def __init__(self, model: LanguageModel) -> None:
        device = next(model.parameters()).device
        # buffers follow from sums over all processes and are equal everywhere: nothing is to be sent
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        with translated():
            self.forward: DistributedDataParallel = DistributedDataParallel(
                model,
                device_ids=None if device.index is None else [device.index],
                gradient_as_bucket_view=True,
            )

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self.forward.no_sync()


class GraphedReplicas(Engine):
    """Every process holds all weights; gradients are averaged when a recorded backward pass is through."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        super().__init__(model)
        self._world = world
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def finish_backward(self) -> None:
        gradients = [p.grad for p in self.forward.parameters() if p.grad is not None]
        with translated():
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
        torch._foreach_div_(gradients, float(self._world.size))


class Shards(Engine):
    """Weights, gradients and optimiser state are split over the processes (FSDP2).

    The unit is a layer with weights of its own, or several in a row if they are small. Where layers run several times,
    it is their stage: gathered once, used by all its repeats, and its gradients sent once. What the backward pass
    begins with stays gathered. Numbers travel in float32, so autocast means what it means alone.
    """

    def __init__(self, model: LanguageModel, world: World) -> None:
        mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
        for number, stage in enumerate(model.stages, start=1):
            assert isinstance(stage, Stage)
            if len(stage.schedule) > len(stage.layers):
                fully_shard(stage, mesh=mesh, reshard_after_forward=False)
            else:
                *units, last = _units(list(stage.layers))
                for unit in units:
                    fully_shard(unit, mesh=mesh)
                fully_shard(last, mesh=mesh, reshard_after_forward=number < len(model.stages))
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        super().__init__(model)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.forward, FSDPModule)
        self.forward.set_requires_gradient_sync(is_last)
        return nullcontext()


def _units(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Layers in a row, put together until they reach the smallest unit; what is left joins the last."""
    units: list[list[nn.Module]] = [[]]
    size = 0
    for layer in layers:
        if size >= SMALLEST_UNIT:
            units.append([])
            size = 0
        units[-1].append(layer)
        size += sum(weight.numel() * weight.element_size() for weight in layer.parameters())
    if size < SMALLEST_UNIT and len(units) > 1:
        rest = units.pop()
        units[-1] += rest
    return units


def spread(model: LanguageModel, world: World, parallelism: Parallelism, *, graphed: bool) -> Engine:
    """The engine that a recipe asks for; alone, the model itself."""
    if world.size == 1:
        return Engine(model)
    if parallelism == "fsdp":
        return Shards(model, world)
    return GraphedReplicas(model, world) if graphed else Replicas(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, gathered from all processes if it is split over them; all have to ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with translated():
        return tensor.full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is split over processes, sharing its memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_of_whole(norm_of_parts: Tensor, tensor: Tensor) -> Tensor:
    """The L2 norm of tensors from the norm of the parts that this process holds.

    All are split over the same processes, as `tensor` is, and no part is held twice.
    """
    if not isinstance(tensor, DTensor):
        return norm_of_parts
    squares = DTensor.from_local(norm_of_parts.square(), tensor.device_mesh, [Partial()], run_check=False)
    return whole(squares).sqrt()


def collect(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Tensors in one piece, one after the other; those that were split come back on the CPU, and only with `keep`."""
    collected = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if full is tensor:
            collected[name] = tensor
        elif keep:
            collected[name] = full.cpu()
    return collected


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` split over the processes as `target` is, without sending anything: all hold the whole of it."""
    if not isinstance(target, DTensor):
        return value
    on_device = value.to(target.device)
    return distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
