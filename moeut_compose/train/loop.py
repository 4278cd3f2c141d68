"""One optimiser step, and everything that must be remembered to take the next one.

A `Trainer` knows nothing of files, data or commands: it is handed batches. A step either happens whole or not
at all; when it is interrupted between micro-batches, weights, optimiser and random state are those of the
step before. A step whose loss or gradient is not finite is skipped: it counts, and leaves no other trace.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moeut_compose.blocks.roles import Router
from moeut_compose.blocks.stats import Stats, below, pool, totals, under
from moeut_compose.blocks.steered_routers import any_steered, steer_routers
from moeut_compose.data.tokens import inputs_and_targets
from moeut_compose.train.errors import TrainError
from moeut_compose.train.graph import GraphedPass
from moeut_compose.train.nonfinite import first_nonfinite, nonfinite_weight
from moeut_compose.train.optim import build_optimizer, clip_gradients
from moeut_compose.train.parallel import Engine, collect, like
from moeut_compose.train.router_load import loads_by_repeat
from moeut_compose.train.schedule import lr_at
from moeut_compose.train.skipping import SkipCounter, step_unless
from moeut_compose.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.spec.recipe import OptimizerSpec, ScheduleSpec
    from moeut_compose.train.device import Precision

SEED_STRIDE = 1_000_003
"""Keeps the random numbers of processes apart."""


class Trainer:
    """Model, optimiser, loss scale and step count."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        optimizer: OptimizerSpec,
        schedule: ScheduleSpec,
        steps: int,
        clip_norm: float | None,
        precision: Precision,
        micro_batch: int,
        graphed: bool = False,
        world: World | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Settings of the steps.

        `graphed`: replay forward and backward as a CUDA graph; tokens and shapes must decide nothing on the host.
        `world` and `engine`: the processes that share each batch, and how; without them this one is alone.
        """
        self.model = model
        self._world = world or World()
        self._engine = engine or Engine(model)
        self._graphed = graphed
        self._graph: GraphedPass | None = None
        self._steers = any_steered(model)
        self.seen: Stats = {}
        """What the routers and halting rules of the last step returned, summed over its batch; and by repeat."""
        self.step = 0
        self.steps = steps
        self.micro_batch = micro_batch
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, optimizer)
        self._base_lr = optimizer.lr
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._precision = precision
        self._scaler = precision.scaler()
        self.skips = SkipCounter(self.device)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return lr_at(self.step, self._schedule, self._base_lr, steps=self.steps)

    def train_step(
        self, batch: Tensor, *, between: Callable[[float], None] = lambda share: None
    ) -> dict[str, Tensor]:
        """Take one optimiser step on windows `batch [B, T + 1]`, or pairs of inputs and targets `[B, 2, T]`.

        They are this process' part of the batch. Loss and gradient are the means over the batches of all
        processes, whatever the micro-batch. `between` is called after each micro-batch with its share of the batch;
        whatever it raises undoes the step. Returns scalars on the device: `loss`, its parts (`cross_entropy` and the
        model's own terms), `grad_norm` before clipping, and the boolean `skipped`: loss or norm is not finite, and
        weights, buffers and optimiser are as before.
        """
        self.model.train()
        random_state = random_state_dict(self.device)
        try:
            values = self._accumulate(batch, between)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            load_random_state(random_state, self.device)
            raise
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self._clip_norm).detach()
        has_loss = values["loss"].isfinite()
        skipped = ~(has_loss & norm.isfinite())
        self.skips.record(self.step, skipped, has_loss & self._scale_may_fall())
        step_unless(skipped, self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._steers:
            self._steer_unless(skipped)
        self.step += 1
        return values | {"grad_norm": norm, "skipped": skipped}

    def _scale_may_fall(self) -> Tensor:
        """Whether a float16 loss scale is large enough to be what let gradients overflow."""
        scale = self._scaler.scale(torch.ones((), device=self.device))
        assert isinstance(scale, torch.Tensor)
        return scale > 1.0

    def _steer_unless(self, skipped: Tensor) -> None:
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        buffers = [buffer for router in routers for buffer in router.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        steer_routers(self.model, self.seen)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(skipped, old, buffer))

    def find_nonfinite(self, batch: Tensor) -> str | None:
        """Repeat forward and backward on `batch [B, T + 1]` and name what is not finite first; None: nothing.

        It is a weight, or else what `first_nonfinite` finds on the first process that finds anything.

        Weights and random state stay as they are; recorded graphs are given up.
        """
        self._graph = None
        self.model.train()
        state = random_state_dict(self.device)

        def run() -> None:
            for part in batch.split(self.micro_batch):
                self._forward_backward(part.to(self.device), len(part) / len(batch))

        def first(found: list[str | None]) -> str | None:
            return next((name for name in found if name is not None), None)

        weight = first(self._world.gather(nonfinite_weight(self.model)))
        if weight is not None:
            return f"weight {weight}"
        try:
            return first(self._world.gather(first_nonfinite(self.model, run)))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            load_random_state(state, self.device)

    def fitting_step(
        self,
        batch: Tensor,
        *,
        between: Callable[[float], None],
        may_shrink: bool,
        warn: Callable[[str], None],
    ) -> dict[str, Tensor]:
        """`train_step`, with smaller micro-batches from the moment when memory runs out, if they may shrink.

        Raises `TrainError` if they may not, or hold one sequence.
        """
        while True:
            try:
                return self.train_step(batch, between=between)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            if not may_shrink or self.micro_batch == 1:
                raise TrainError(
                    f"out of memory at step {self.step} with micro-batches of {self.micro_batch} x "
                    f"{batch.shape[1] - 1} tokens; set recipe.batch.micro or recipe.context lower ({reason})"
                )
            torch.cuda.empty_cache()
            self.micro_batch = -(-self.micro_batch // 2)
            self._graph = None
            warn(f"out of memory; going on with micro-batches of {self.micro_batch} sequences")

    def _accumulate(self, batch: Tensor, between: Callable[[float], None]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        self.seen = {}
        parts = batch.split(self.micro_batch)
        for number, part in enumerate(parts):
            share = len(part) / len(batch)
            with self._engine.micro_batch(is_last=number + 1 == len(parts)):
                terms = self._pass(part.to(self.device, non_blocking=True), share)
            if self._graph is not None and number + 1 < len(parts):
                self._graph.keep_gradients()
            self.seen = pool(self.seen, below("stats", terms))
            for name, term in terms.items():
                if not name.startswith("stats."):
                    values[name] = values.get(name, 0.0) + term * share
            between(share)
        self._engine.finish_backward()
        self.seen = self._world.sum(self.seen)
        return self._world.mean(values)

    def _pass(self, part: Tensor, share: float) -> dict[str, Tensor]:
        """`_forward_backward`, replayed where a graph of it is asked for and fits."""
        if not self._graphed or (self._graph is not None and self._graph.shape != part.shape):
            return self._forward_backward(part, share)
        if self._graph is None:
            state = random_state_dict(self.device)
            run = partial(self._forward_backward, share=share)
            self._graph = GraphedPass(run, part, list(self.model.parameters()))
            load_random_state(state, self.device)
        return self._graph(part)

    def _forward_backward(self, windows: Tensor, share: float) -> dict[str, Tensor]:
        """Of a micro-batch that is a `share` of the batch: its losses, without gradient, and its statistics."""
        with self._precision.autocast():
            inputs, targets = inputs_and_targets(windows)
            out = self._engine.forward(inputs, targets=targets)
            loss = out.cross_entropy + sum(out.losses.values())
        self._scaler.scale(loss * share).backward()
        terms = {"loss": loss, "cross_entropy": out.cross_entropy, **out.losses}
        terms |= under("stats", totals(out.stats) | loads_by_repeat(out.by_repeat))
        return {name: term.detach() for name, term in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """All but the weights: tensors by parameter name, numbers and random states of all processes.

        All processes have to ask for it; the tensors of the optimiser are complete on the main one.
        """
        first, *others = self._world.gather(random_state_dict(self.device))
        return {
            "step": self.step,
            "optimizer": optimizer_state(self.optimizer, self.model, keep=self._world.is_main),
            "scaler": self._scaler.state_dict(),
            "skips": self.skips.state_dict(),
            "random": first,
            "random_of_others": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; rate and other settings stay those of this trainer."""
        self.step = state["step"]
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if "skips" in state:
            self.skips.load_state_dict(state["skips"])
        states = [state["random"], *state.get("random_of_others", ())]
        if len(states) == self._world.size or self._world.is_main:
            load_random_state(states[self._world.rank], self.device)
        else:
            torch.manual_seed(SEED_STRIDE * self._world.rank + self.step)


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, keep: bool = True
) -> dict[str, dict[str, Any]]:
    """The optimiser's tensors under parameter names; where they are split over processes, gathered if `keep` is set."""
    return {
        name: collect(optimizer.state[p], keep=keep)
        for name, p in _updated_parameters(optimizer, model)
        if p in optimizer.state
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """The reverse of `optimizer_state`. Raises ValueError unless moments have the shapes of their parameters."""
    parameters = _updated_parameters(optimizer, model)
    for name, p in parameters:
        shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        moments = state.get(name, {})
        found = {key: value.shape for key, value in moments.items() if value.is_floating_point()}
        if moments and found != shapes:
            raise ValueError(f"the moments of {name} are not those of AdamW in its shape: {found}")
    current = optimizer.state_dict()
    current["state"] = {
        index: {
            key: like(value, p) if value.shape == p.shape else value for key, value in state[name].items()
        }
        for index, (name, p) in enumerate(parameters)
        if name in state
    }
    optimizer.load_state_dict(current)


def _updated_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the optimiser updates, in its order, by name; the model shows other tensors while it gathers split ones."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for name, _ in model.named_parameters()]
    return list(zip(names, parameters, strict=True))


def random_state_dict(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that a step may draw from."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The reverse of `random_state_dict`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
