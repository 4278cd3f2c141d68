"""The process-wide switches of a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moeut_compose.train.modes import _has_glibc, kept_memory

FAULTS = """
import resource, torch
from moeut_compose.train.modes import kept_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        tensors = [torch.ones(mebibytes * 2**18) for mebibytes in (40, 64, 48, 36)]
        tensors += [tensor + 1 for tensor in tensors]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def small_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(4 * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu = torch.device("cpu")
outside = faults(1)
with kept_memory(cpu):
    faults(2)
    inside = faults(8)
    with kept_memory(cpu):
        pass
    nested = faults(8)
behind = faults(1)
small_faults()
print(outside, inside, nested, behind, small_faults())
"""


def faults(**environment: str) -> list[int]:
    """Pages faulted by a round of tensors outside, by eight inside, by eight more behind a nested block, by one behind it
    all, and by forty small tensors there."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=plain | environment, capture_output=True, text=True, check=True
    )
    return [int(number) for number in result.stdout.split()]


@pytest.mark.skipif(not _has_glibc(), reason="another C library's allocator is left alone")
class TestKeptMemory:
    def test_freed_memory_serves_again_inside_only(self) -> None:
        outside, inside, nested, behind, small = faults()
        assert inside < outside
        assert nested < outside
        assert behind > outside * 0.9
        assert small < outside // 10, "what the allocator kept of itself before, it keeps again"

    @pytest.mark.parametrize(
        ("name", "value"), [("MALLOC_ARENA_MAX", "4"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")]
    )
    def test_an_allocator_that_the_environment_sets_up_stays(self, name: str, value: str) -> None:
        outside, inside, *_ = faults(**{name: value})
        assert inside > 7 * outside


def test_other_devices_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("the C library was asked"))
    with kept_memory(torch.device("cuda")):
        pass
