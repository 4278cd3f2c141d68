"""The language model: ids, embedding, stages, norm, head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeut_compose.blocks.cache import Cache, Memory
from moeut_compose.blocks.cross_entropy import LossAndGradient, linear_cross_entropy, loss_and_gradient
from moeut_compose.blocks.initialisation import normal_, uniform_
from moeut_compose.blocks.stages import Stage
from moeut_compose.blocks.stats import Repeats, Stats, under


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass computes, and nothing else."""

    logits: Tensor | None
    """`[B, T, V]`; None when targets were given."""
    cross_entropy: Tensor | None
    """Mean cross entropy over the targets, in nats; None without targets."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Balance and halting terms, already weighted; empty outside training."""
    stats: Stats = field(default_factory=dict)
    """Additive router sums, pooled over repeats."""
    by_repeat: Repeats = field(default_factory=dict)
    """The sums of routers before pooling, without gradient: one `[B, ...]` for each repeat."""
    cache: Cache | None = None
    """What to pass to the next call; None when no cache was passed."""


class LanguageModel(nn.Module):
    """A decoder-only language model over stages of shared layers."""

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        stages: Sequence[Stage],
        embedding_scale: float,
        embedding_norm: nn.Module,
        final_norm: nn.Module,
        head: nn.Linear | None,
        tied_bias: bool = False,
    ) -> None:
        super().__init__()
        self.loss_and_gradient: LossAndGradient = loss_and_gradient
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.embedding_scale = embedding_scale
        self.embedding_norm = embedding_norm
        self.stages = nn.ModuleList(stages)
        self.final_norm = final_norm
        self.head = head
        self.tied_bias = nn.Parameter(torch.empty(vocab_size)) if head is None and tied_bias else None

    def reset_parameters(self, *, layer_scales: Sequence[Sequence[float]]) -> None:
        """Draw all weights; `layer_scales[stage][member]` is the depth factor c of the published initialisation."""
        d_model = self.embedding.embedding_dim
        normal_(self.embedding.weight, std=1.0 / math.sqrt(d_model))
        for stage, scales in zip(self.stages, layer_scales, strict=True):
            stage.reset_parameters(layer_scales=scales)
        if hasattr(self.final_norm, "reset_parameters"):
            self.final_norm.reset_parameters()
        head = (self.tied_bias,) if self.head is None else (self.head.weight, self.head.bias)
        for weight in head:
            if weight is not None:
                uniform_(weight, bound=1.0 / math.sqrt(d_model))

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        logits_at: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the token after each of `ids [B, T]`.

        With `targets [B, T]` (-100: ignored) the mean cross entropy takes the place of logits. With a `cache`, `ids`
        continue the tokens that the cache has seen. With `logits_at [B]` only the logits after those places in `ids`
        are computed, `[B, 1, V]`.
        """
        x = self.embedding(ids)
        x = self.embedding_norm(x if self.embedding_scale == 1.0 else x * self.embedding_scale)
        start = 0 if cache is None else cache.length
        past = () if cache is None else cache.memories
        losses: dict[str, Tensor] = {}
        stats: Stats = {}
        by_repeat: Repeats = {}
        memories: tuple[Memory, ...] = ()
        for index, stage in enumerate(self.stages):
            done = len(memories)
            end = done + len(stage.schedule)  # type: ignore[arg-type]
            run = stage(x, start=start, past=past[done:end], remember=cache is not None)
            x = run.hidden
            losses |= under(f"stages.{index}", run.losses)
            stats |= under(f"stages.{index}", run.stats)
            by_repeat |= under(f"stages.{index}", run.by_repeat)
            memories += run.memories
        if logits_at is not None:
            x = x[torch.arange(len(x), device=x.device), logits_at].unsqueeze(1)
        x = self.final_norm(x)
        return ModelOutput(
            logits=self._logits(x) if targets is None else None,
            cross_entropy=None if targets is None else self._cross_entropy(x, targets),
            losses=losses,
            stats=stats,
            by_repeat=by_repeat,
            cache=None if cache is None else Cache(start + ids.shape[1], memories),
        )

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        return F.linear(x, self.embedding.weight, self.tied_bias)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        bias = self.tied_bias if self.head is None else self.head.bias
        return linear_cross_entropy(
            x.flatten(0, 1), weight, bias, targets.flatten(), of_chunk=self.loss_and_gradient
        )
