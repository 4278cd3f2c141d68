"""The device a run uses, and the arithmetic that suits it."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from moeut_kernels.backend import backend

from moeut_compose.train.errors import TrainError

PrecisionName = Literal["bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device itself, or for "auto" the first GPU and else the CPU.

    Raises `TrainError` where the back end that is asked for cannot run.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    check_backend(backend(), place)
    return place


def check_backend(name: str, device: torch.device) -> None:
    """Raises `TrainError` where the kernels of a back end cannot run."""
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TrainError(
            "the back end triton needs a CUDA device; auto, grouped_mm, bmm and torch run on a CPU"
        )


def own_device(device: str | torch.device, number: int) -> torch.device:
    """The device of process `number` on its machine, where each has one: that GPU, or the CPU.

    Raises `TrainError` if there are fewer GPUs or one of them is named.
    """
    place = choose_device(device)
    if place.type != "cuda":
        return place
    if place.index is not None:
        raise TrainError(f"--device {place}: each process takes a GPU of its own; write auto or cuda")
    if number >= torch.cuda.device_count():
        raise TrainError(
            f"process {number} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most one process for each (torchrun --nproc-per-node)"
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own


def describe_device(device: torch.device) -> str:
    """A name for people."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the training step; weights and optimiser state are float32 always."""

    name: PrecisionName
    device_type: str

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a training forward pass. Evaluation never enters it."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16, and a scaler that does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(name: PrecisionName | Literal["auto"], device: torch.device) -> Precision:
    """As published for "auto": bf16 on GPUs that compute in it, fp16 on older ones; fp32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return Precision(name, device.type)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, if the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_available_memory(), _memory_limit()) if value is not None]
    return min(found, default=None)


def used_memory(device: torch.device) -> int | None:
    """Peak bytes used: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def forget_used_memory(device: torch.device) -> None:
    """Let `used_memory` begin anew, where the system can: on CUDA and on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets the peak resident set


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _memory_limit() -> int | None:
    """What the control group that this process runs in may still use."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return None
