"""One look at a run: forward passes over held-out text, and all statistics of what was observed.

Memory does not depend on the number of windows: every statistic is a sum, and tensors of a batch go with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from moeut_compose.analyze.calls import RouterCalls, RouterName, router_calls
from moeut_compose.analyze.diversity import Diversity, DiversitySums
from moeut_compose.analyze.halting import Depths, HaltingSums
from moeut_compose.analyze.observe import Application, observing
from moeut_compose.analyze.overlap import Overlap, OverlapSums
from moeut_compose.analyze.pairs import CoOccurrence, PairSums
from moeut_compose.analyze.repeats import RepeatsCurve, loss_by_repeats
from moeut_compose.analyze.residual import Residual, ResidualSums, Similarity
from moeut_compose.analyze.usage import Usage, UsageSums
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.stages import Step, schedule

if TYPE_CHECKING:
    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.tokens import TokenFile
    from moeut_compose.progress import Reporter
    from moeut_compose.spec.model import ModelSpec


@dataclass(frozen=True)
class RouterFigures:
    """All that was seen of one router."""

    name: RouterName
    n_heads: int
    n_experts: int
    n_repeats: int
    usage: Usage
    overlap: Overlap
    diversity: Diversity
    pairs: CoOccurrence

    @property
    def has_teams(self) -> bool:
        """Whether tokens use several experts of one set."""
        return self.n_heads == 1 and self.n_experts > 2 and bool(self.usage.share.sum(-1).max() > 1.5)


@dataclass(frozen=True)
class Figures:
    """All that was seen of a model."""

    windows: int
    context: int
    cross_entropy: float
    """Nats per token."""
    steps: tuple[Step, ...]
    """The applications, in running order."""
    residual: Residual
    similarity: Similarity
    routers: tuple[RouterFigures, ...]
    """In the order of the layers; none for a model without experts."""
    depths: dict[int, Depths]
    """By stage; empty for a model that does not halt."""
    curves: tuple[RepeatsCurve, ...]
    """Empty for a model that does not repeat."""

    @property
    def tokens(self) -> int:
        return self.windows * self.context


def observe_model(
    model: LanguageModel,
    spec: ModelSpec,
    text: TokenFile,
    *,
    context: int,
    windows: int | None = None,
    batch_size: int = 4,
    reporter: Reporter | None = None,
) -> Figures:
    """Watch a model read the first `windows` windows of a text (none: all), in float32 outside autocast.

    No figure depends on the batch size but for rounding. Raises `ValueError` if there is no window.
    """
    reporter = reporter or SilentReporter()
    count = text.n_windows(context) if windows is None else min(windows, text.n_windows(context))
    if count == 0:
        raise ValueError(f"the text has {text.index.n_tokens} tokens, less than one window of {context}")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = _Sums(spec, device)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            observing(model) as seen,
            reporter.task("observing", total=count) as task,
        ):
            for start in range(0, count, batch_size):
                numbers = range(start, min(start + batch_size, count))
                batch = torch.from_numpy(text.windows(numbers, context)).to(device)
                logits = model(batch[:, :-1]).logits
                losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
                first = torch.tensor(numbers, device=device)[:, None] * context
                positions = first + torch.arange(context, device=device)
                sums.add(seen, batch[:, :-1], positions, losses)
                seen.clear()
                task.advance(len(numbers))
        curves = loss_by_repeats(
            model, spec, text, context=context, windows=count, batch_size=batch_size, reporter=reporter
        )
    finally:
        model.train(was_training)
    return sums.result(count, context, curves)


class _RouterSums:
    """All statistics of one router."""

    def __init__(self, calls: RouterCalls, vocab_size: int, device: torch.device) -> None:
        self.shape = n_repeats, n_heads, n_experts = calls.shape
        self.usage = UsageSums(n_repeats, n_heads, n_experts, device)
        self.overlap = OverlapSums(n_repeats, n_heads, n_experts, device)
        self.diversity = DiversitySums(n_heads, n_experts, vocab_size, device)
        self.pairs = PairSums(n_repeats, n_heads, n_experts, device)

    def add(self, calls: RouterCalls) -> None:
        for part in (self.usage, self.overlap, self.diversity, self.pairs):
            part.add(calls)

    def result(self, name: RouterName) -> RouterFigures:
        n_repeats, n_heads, n_experts = self.shape
        parts = (self.usage.result(), self.overlap.result(), self.diversity.result(), self.pairs.result())
        return RouterFigures(name, n_heads, n_experts, n_repeats, *parts)


class _Sums:
    """All statistics of a model."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._steps = tuple(schedule(spec.stages))
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._residual = ResidualSums(len(self._steps), device)
        self._routers: dict[RouterName, _RouterSums] = {}
        self._halting = {
            index: HaltingSums(stage.repeats, spec.vocab_size, device)
            for index, stage in enumerate(spec.stages)
            if stage.halting.kind != "none" and stage.repeats > 1
        }

    def add(self, seen: list[Application], ids: Tensor, positions: Tensor, losses: Tensor) -> None:
        self._loss += losses.double().sum()
        self._residual.add(seen)
        for stage, halting in self._halting.items():
            halting.add([one for one in seen if one.stage == stage], ids, losses)
        for name, calls in router_calls(seen, ids, positions).items():
            if name not in self._routers:
                self._routers[name] = _RouterSums(calls, self._spec.vocab_size, self._device)
            self._routers[name].add(calls)

    def result(self, windows: int, context: int, curves: list[RepeatsCurve]) -> Figures:
        residual, similarity = self._residual.result()
        return Figures(
            windows=windows,
            context=context,
            cross_entropy=self._loss.item() / (windows * context),
            steps=self._steps,
            residual=residual,
            similarity=similarity,
            routers=tuple(sums.result(name) for name, sums in self._routers.items()),
            depths={stage: halting.result() for stage, halting in self._halting.items()},
            curves=tuple(curves),
        )
