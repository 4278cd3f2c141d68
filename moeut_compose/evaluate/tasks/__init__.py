"""The zero-shot benchmarks: each module reads the files of one, in their original format, into items.

Nothing here needs torch. How items are scored is the business of `evaluate.protocols`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeut_compose.evaluate.tasks import arc_easy, blimp, cbt, hellaswag, lambada, piqa

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moeut_compose.evaluate.tasks.items import Item


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str
    title: str
    read_published: Callable[[Path], Sequence[Item]]
    """Reads the items of the published protocol from a folder."""
    read_harness: Callable[[Path], Sequence[Item]] | None
    """Reads those of lm-evaluation-harness; None where there are no harness rules."""


TASKS = {
    task.name: task
    for task in (
        Task("lambada", "LAMBADA", lambada.read, lambada.read),
        Task("blimp", "BLiMP", blimp.read, blimp.read),
        Task("cbt", "CBT", cbt.read, None),
        Task("hellaswag", "HellaSwag", hellaswag.read_published, hellaswag.read),
        Task("piqa", "PIQA", piqa.read, piqa.read),
        Task("arc_easy", "ARC-Easy", arc_easy.read_published, arc_easy.read),
    )
}
"""In the order of the published tables."""
