"""One row for each model: what it is, what it costs, and, once trained, what it reached.

Rows come from specs and from run folders alike. Training cost is three forward passes of exact
multiply-accumulates for every token, the usual convention; time is what the metrics of the run recorded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.measure.phases import FORWARD_PASSES_PER_STEP
from moeut_compose.spec.model import ModelSpec


@dataclass(frozen=True)
class Progress:
    """A run at one point of its training."""

    tokens: int
    macs: int
    """Multiply-accumulates spent so far."""
    seconds: float
    """Time spent training so far."""
    loss: float
    """Training cross entropy in nats per token."""


@dataclass(frozen=True)
class Row:
    """A model among others; what only a run knows is None for a spec."""

    name: str
    params: int
    active_per_token: int
    macs_per_token: int
    seq_len: int
    tokens: int | None = None
    training_macs: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    memory_gib: float | None = None
    history: tuple[Progress, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["history"]
        return fields


COLUMNS = [
    "name",
    "params",
    "active_per_token",
    "macs_per_token",
    "tokens",
    "training_macs",
    "loss",
    "validation_loss",
    "perplexity",
    "bits_per_byte",
    "tokens_per_second",
    "memory_gib",
]
"""The columns of a comparison, in order."""


def row_of_spec(spec: ModelSpec, seq_len: int | None = None) -> Row:
    """What is known before training."""
    params, macs = count_params(spec), count_macs(spec, seq_len)
    return Row(
        name=spec.name,
        params=params.total,
        active_per_token=params.active_per_token,
        macs_per_token=macs.total_per_token,
        seq_len=macs.seq_len,
    )


def row_of_run(folder: Path, spec: ModelSpec, seq_len: int) -> Row:
    """What is known from the metrics of a run; `seq_len` is the length of its training windows.

    Raises ValueError naming the line if the metrics are damaged.
    """
    planned = row_of_spec(spec, seq_len)
    entries = _read_metrics(folder / "metrics.jsonl")
    train = [entry for entry in entries if entry["event"] == "train"]
    validation = [entry for entry in entries if entry["event"] == "validation"]
    history = _history(train, planned.macs_per_token)
    last = validation[-1] if validation else {}
    memory = [entry["memory_bytes"] for entry in train if entry.get("memory_bytes")]
    return Row(
        **{
            name: getattr(planned, name)
            for name in ("params", "active_per_token", "macs_per_token", "seq_len")
        },
        name=folder.resolve().name,
        tokens=history[-1].tokens if history else 0,
        training_macs=history[-1].macs if history else 0,
        loss=history[-1].loss if history else None,
        validation_loss=last.get("cross_entropy"),
        perplexity=last.get("perplexity"),
        bits_per_byte=last.get("bits_per_byte"),
        tokens_per_second=median(entry["tokens_per_second"] for entry in train) if train else None,
        memory_gib=max(memory) / 2**30 if memory else None,
        history=tuple(history),
    )


_FIGURES = {
    "train": ("tokens", "tokens_per_second", "cross_entropy", "memory_bytes"),
    "validation": ("cross_entropy", "perplexity", "bits_per_byte"),
}
"""What is read of each event; `memory_bytes` may be missing or null."""
_LARGEST = 2.0**63


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number or nesting too large"
            raise ValueError(f"{path}:{number}: not a line of metrics ({reason})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
            raise ValueError(f"{path}:{number}: not a line of metrics (no event)")
        for name in _FIGURES.get(entry["event"], ()):
            if not (_is_figure(entry.get(name)) or (name == "memory_bytes" and entry.get(name) is None)):
                raise ValueError(f"{path}:{number}: not a line of metrics ({name} is no figure)")
        entries.append(entry)
    return entries


def _is_figure(value: object) -> bool:
    """A number that may be nan or infinite, but no count that nothing could reach."""
    return isinstance(value, float) or (type(value) is int and 0 <= value <= _LARGEST)


def _history(train: list[dict[str, Any]], macs_per_token: int) -> list[Progress]:
    seconds, before, history = 0.0, 0, []
    for entry in train:
        if entry["tokens_per_second"]:
            seconds += (entry["tokens"] - before) / entry["tokens_per_second"]
        before = entry["tokens"]
        history.append(
            Progress(
                tokens=before,
                macs=FORWARD_PASSES_PER_STEP * macs_per_token * before,
                seconds=seconds,
                loss=entry["cross_entropy"],
            )
        )
    return history
