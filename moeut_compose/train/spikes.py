"""Noticing that the loss jumped, and saying where to look."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.train.metrics import Row

LOOKS_BACK = 12
"""Rows that the newest is compared with."""
_DEVIATIONS = 8.0
_NATS = 0.1
"""Smaller jumps are not worth a word."""


def spike(rows: Sequence[Row]) -> str | None:
    """What to say if the cross entropy of the newest row of training is far above the rows before it.

    Far is more than eight median absolute deviations and a tenth of a nat above their median. Fewer than twelve rows
    say nothing.
    """
    known = [row for row in rows if row["event"] == "train"][-LOOKS_BACK - 1 :]
    if len(known) <= LOOKS_BACK:
        return None
    *before, newest = known
    losses = [row["cross_entropy"] for row in before]
    median = statistics.median(losses)
    deviation = statistics.median(abs(loss - median) for loss in losses)
    now = newest["cross_entropy"]
    if now <= median + max(_DEVIATIONS * deviation, _NATS):
        return None
    return (
        f"loss spike: {now:.3f} over steps {before[-1]['step'] + 1:,} to {newest['step']:,}, against {median:.3f} "
        f"before (gradient norm {_norm(before[-1])}, now {_norm(newest)})"
    )


def _norm(row: Row) -> str:
    return "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
