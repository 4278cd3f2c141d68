"""Perplexity on held-out text: in float32, outside autocast, over every target of every window.

Windows start without context, as in training. Nothing is dropped, so the figure does not depend on the batch
size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from moeut_compose.blocks.cross_entropy import IGNORED
from moeut_compose.data.errors import DataError
from moeut_compose.data.prepare import prepare_validation
from moeut_compose.data.tokens import TokenFile, inputs_and_targets, open_tokens
from moeut_compose.progress import SilentReporter
from moeut_compose.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from moeut_compose.data.prepare import Windows
    from moeut_compose.progress import Reporter
    from moeut_compose.spec.recipe import DataSpec
    from moeut_compose.train.run import Run


@dataclass(frozen=True)
class Perplexity:
    """A model's loss on a text."""

    cross_entropy: float
    """Nats per token."""
    perplexity: float
    """exp(cross entropy); comparable only between models of one tokenizer."""
    bits_per_byte: float
    """Bits per UTF-8 byte of the text, separators included; comparable between tokenizers."""
    tokens: int
    """Targets predicted."""
    windows: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def measure_perplexity(
    model: nn.Module,
    text: Windows,
    *,
    context: int,
    windows: int | None = None,
    batch_size: int = 8,
    between: Callable[[int], None] = lambda n: None,
    world: World | None = None,
) -> Perplexity:
    """Perplexity of a model over the first `windows` windows of a text (none: all).

    The processes of `world` take a batch each in turn. `between` is called after each round of batches with its
    number of windows.
    """
    world = world or World()
    device = next(model.parameters()).device
    count = text.n_windows(context) if windows is None else min(windows, text.n_windows(context))
    if count == 0:
        raise ValueError(f"the text has {text.index.n_tokens} tokens, less than one window of {context}")
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for start in range(0, count, batch_size * world.size):
                first = start + batch_size * world.rank
                indices = range(first, min(first + batch_size, count))
                # split weights need every process: without windows of its own one computes for nothing
                batch = torch.from_numpy(text.windows(indices or range(1), context)).to(device)
                inputs, targets = inputs_and_targets(batch)
                out = model(inputs, targets=targets)
                n_targets = (targets != IGNORED).sum() * bool(indices)
                sums += torch.stack((out.cross_entropy.double() * n_targets, n_targets.double()))
                between(min(batch_size * world.size, count - start))
    finally:
        model.train(was_training)
    nats, n_targets = world.sum({"sums": sums})["sums"].tolist()
    n_tokens = int(n_targets)
    mean = nats / n_tokens
    # of examples that are made up, every scored token counts as a byte
    n_bytes = text.n_bytes(1, 1 + count * context) if isinstance(text, TokenFile) else n_tokens
    return Perplexity(
        cross_entropy=mean,
        perplexity=math.inf if mean >= 700 else math.exp(mean),
        bits_per_byte=nats / math.log(2) / n_bytes,
        tokens=n_tokens,
        windows=count,
    )


def evaluate_run(
    run: Run,
    *,
    windows: int | None = None,
    batch_size: int = 8,
    data: DataSpec | None = None,
    reporter: Reporter | None = None,
) -> dict[str, float | int]:
    """Perplexity of a trained run on its held-out text, or on that of `data`.

    The held-out text lies in the run folder as far as training evaluated it; more windows are made from the
    recipe's data. Returns `perplexity`, `bits_per_byte`, `cross_entropy`, `tokens`, `windows` and `step`.
    Raises `DataError`.
    """
    reporter = reporter or SilentReporter()
    windows = windows or run.recipe.evaluation.windows
    context = run.context
    text = held_out_text(run, windows=windows, data=data, reporter=reporter)
    count = text.n_windows(context) if windows is None else min(windows, text.n_windows(context))
    with reporter.task("evaluating", total=count) as task:
        result = measure_perplexity(
            run.model, text, context=context, windows=windows, batch_size=batch_size, between=task.advance
        )
    return {"step": run.step, **result.to_dict()}


def held_out_text(
    run: Run, *, windows: int | None, data: DataSpec | None = None, reporter: Reporter | None = None
) -> Windows:
    """At least `windows` windows (none: all) of a run's held-out text, or of that of `data`. Raises `DataError`."""
    text = _stored_text(run, windows) if data is None else None
    return text or prepare_validation(
        data or run.recipe.data, run.tokenizer, context=run.context, windows=windows, reporter=reporter
    )


def _stored_text(run: Run, windows: int | None) -> Windows | None:
    """The held-out text in the run folder, if it has all the windows that are asked for."""
    try:
        text = open_tokens(run.path / "validation", run.tokenizer)
        text.check(run.spec.vocab_size)
    except DataError:
        return None
    enough = windows is not None and windows <= text.n_windows(run.context)
    trained_with = run.recipe.evaluation.windows
    return text if enough or windows == trained_with else None
