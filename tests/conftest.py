"""What all tests share: GPU tests run where there is a GPU, and the command line can be started as a process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The tensors of tests are small, and threads that wait for each other take longer than the work: set before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command() -> Command:
    """Run `moeut-compose` from this checkout in a process of its own."""

    def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        line = [sys.executable, "-m", "moeut_compose", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False, env=environment, **options)  # type: ignore[call-overload,no-any-return]

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker ends with a long one alone; GPU tests need a GPU."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
