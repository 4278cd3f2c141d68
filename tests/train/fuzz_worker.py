"""A process that has everything loaded and forks a child for each command.

Reads one JSON line a command: `{"words": [...], "folder": DIR, "seconds": N}`, and answers with the exit status of the
child, negative for a signal. What a command says lies in `DIR/said.txt`. Memory, files and time of a child are
bounded, so that an allocation without bound becomes a `MemoryError` and a hang a SIGALRM. With `"seconds": 0` there is
no child: the command runs in the process itself, and what it loads is loaded for all that follow.
"""

import json
import os
import resource
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from moeut_compose.cli import app
from moeut_compose.interchange.huggingface import export
from moeut_compose.train import plan as planning
from moeut_compose.train import session
from moeut_compose.train.memory import Activations
from tests.train.forking import in_a_child

EXTRA_MEMORY = 3 * 2**30
LARGEST_FILE = 256 * 2**20


def bound(seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.alarm(seconds)


def work(order: dict) -> int:
    """The exit status of the command."""
    os.chdir(order["folder"])
    try:
        app(order["words"])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


def child(order: dict) -> int:
    said = os.open(Path(order["folder"]) / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    bound(order["seconds"])
    return work(order)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    planning.measure_cpu_flops = lambda: 1e11
    planning.trace_activations = lambda *_, **__: Activations(fixed=0, per_sequence=2**20)
    session.plot_loss = lambda rows, folder, title: folder / "loss.png"
    export.check_folder = lambda *_: {
        "n_texts": 0,
        "relative_difference": 0.0,
        "tolerance": 0.0,
        "transformers": "",
    }
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        order = json.loads(line)
        if not order["seconds"]:
            print(work(order), file=answers)
            continue
        print(in_a_child(partial(child, order)), file=answers)


if __name__ == "__main__":
    main()
