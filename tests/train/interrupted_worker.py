"""What `test_parallel.py` starts, once alone and once as two processes: a run that is stopped many times.

`python interrupted_worker.py RANK FOLDER` reads `FOLDER/plan.json`: architecture, recipe, and segments. A segment is the
number of its processes, a free port for them, and the steps after which the main one is sent a signal.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from moeut_compose.progress import SilentReporter
from moeut_compose.spec.io import parse_spec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train import plan as planning
from moeut_compose.train import session
from moeut_compose.train.errors import Interrupted
from moeut_compose.train.memory import Activations
from moeut_compose.train.run import train


class StopAfter(SilentReporter):
    def __init__(self, steps: float | None) -> None:
        self._left = float("inf") if steps is None else steps

    @contextmanager
    def task(self, title, *, total, done=0):
        yield self if title == "training" else Deaf()

    def advance(self, n=1, *, detail="") -> None:
        self._left -= n
        if self._left <= 0:
            self._left = float("inf")
            signal.raise_signal(signal.SIGTERM)


class Deaf:
    def advance(self, n=1, *, detail="") -> None: ...


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    planning.trace_activations = lambda *_, **__: Activations(fixed=0, per_sequence=2**20)
    planning.measure_cpu_flops = lambda: 1e11
    session.plot_loss = lambda rows, out, title: out / "loss.png"
    orders = json.loads((folder / "plan.json").read_text())
    spec = parse_spec(orders["architecture"], file="plan")
    for number, (size, port, stop) in enumerate(orders["segments"]):
        recipe = RecipeSpec.model_validate(
            orders["recipe"] | {"parallelism": ("ddp", "fsdp")[number % 2]}, strict=False
        )
        mark = folder / f"segment-{number}"
        if rank >= size:
            while not mark.exists():
                time.sleep(0.01)
            continue
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        reporter = StopAfter(stop) if rank == 0 else None
        try:
            train(spec, recipe, out=folder / "run", reporter=reporter, device="cpu")
            ended = True
        except Interrupted:
            ended = False
        if rank == 0:
            mark.touch()
        if ended:
            break
    (folder / f"finished-{rank}").touch()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
