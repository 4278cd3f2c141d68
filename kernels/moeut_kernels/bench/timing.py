"""Medians and spread of calls: replays of a CUDA graph, or calls of several candidates in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def time_graph(run: Callable[[], object], *, repeats: int = 20) -> Timing:
    """Capture `run` in a CUDA graph and time its replays: device time without launch gaps from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # operands may still be in the making there
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return _timing(sorted(start.elapsed_time(end) for start, end in events))


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time every run once a round, so that whatever else the machine does strikes all of them alike.

    CUDA events around each call on a GPU, the wall clock elsewhere.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    return {name: _timing(sorted(of_run)) for name, of_run in times.items()}


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _timing(ordered: list[float]) -> Timing:
    n = len(ordered)
    return Timing(ordered[n // 2], ordered[n // 10], ordered[-1 - n // 10])
