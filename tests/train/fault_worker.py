"""A process that has everything loaded and forks a child for each run, so that a fault costs no start-up time.

Reads one JSON line a run: `{"words": [...], "phase": ..., "fault": ..., "errors": FILE, ...}`, and answers with the exit status
of the child, negative for a signal. A fault strikes where its phase stands in `POINTS`, once, and notes in
`FILE.struck` which checkpoints were there.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import moeut_compose.cli.run  # noqa: F401
from moeut_compose.cli import app
from moeut_compose.data import prepare, tokenizer, tokens
from moeut_compose.train import checkpoint, loop, metrics, run, saving, session
from moeut_compose.train import plan as planning
from moeut_compose.train.memory import Activations
from tests.train.forking import in_a_child

POINTS: dict[str, tuple[object, str, int, bool]] = {
    # phase: where, what is called there, the call that fails, whether it has done its work by then
    "training the tokenizer": (tokenizer, "train_tokenizer", 1, False),
    "keeping the tokenizer": (prepare, "prepare_tokens", 1, False),
    "tokenising": (tokens, "_publish", 1, False),
    "publishing tokens": (tokens, "_publish", 1, True),
    "writing the run folder": (run, "write_atomically", 1, True),
    "building the model": (run, "build_model", 1, False),
    "the first step": (loop.Trainer, "_forward_backward", 1, True),
    "between micro-batches": (loop.Trainer, "_forward_backward", 9, True),
    "clipping": (loop, "clip_gradients", 5, True),
    "the update": (loop, "step_unless", 5, True),
    "writing metrics": (metrics.MetricsLog, "append", 3, False),
    "evaluating": (session, "measure_perplexity", 1, False),
    "writing weights": (checkpoint, "save_file", 2, True),
    "writing the training state": (checkpoint.torch, "save", 2, True),
    "publishing a checkpoint": (checkpoint, "_replace_folder", 2, False),
    "moving the pointer": (checkpoint, "_replace_folder", 2, True),
    "pruning": (saving, "prune_checkpoints", 2, False),
    "drawing": (session, "plot_loss", 1, False),
}
ERRORS = {"disk full": errno.ENOSPC, "no permission": errno.EACCES, "input/output error": errno.EIO}


def strike(fault: str) -> None:
    if fault in ERRORS:
        raise OSError(ERRORS[fault], os.strerror(ERRORS[fault]), "a-file")
    os.kill(os.getpid(), signal.Signals[fault])


def arm(phase: str, fault: str, note: Callable[[], None]) -> None:
    where, name, number, has_worked = POINTS[phase]
    original = getattr(where, name)
    calls = 0

    def trapped(*args, **options):
        nonlocal calls
        calls += 1
        if calls != number:
            return original(*args, **options)
        result = original(*args, **options) if has_worked else None
        note()
        strike(fault)
        return result if has_worked else original(*args, **options)

    setattr(where, name, trapped)


def child(order: dict) -> None:
    os.environ["MOEUT_COMPOSE_CACHE"] = order["cache"]
    errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if order["phase"]:
        folder = Path(order["out"]) / "checkpoints"

        def note() -> None:
            Path(order["errors"] + ".struck").write_text(
                json.dumps(sorted(p.name for p in folder.glob("step-*")))
            )

        arm(order["phase"], order["fault"], note)
    app(order["words"])


def main() -> None:
    torch.set_num_threads(1)
    planning.trace_activations = lambda *_, **__: Activations(fixed=0, per_sequence=2**20)
    planning.measure_cpu_flops = lambda: 1e11
    session.plot_loss = lambda rows, folder, title: folder / "loss.png"
    for line in sys.stdin:
        order = json.loads(line)
        print(in_a_child(partial(child, order)), flush=True)


if __name__ == "__main__":
    main()
