"""Forward and backward of a micro-batch as one CUDA graph: recorded once, then replayed without Python in between.

A layer that runs nine times launches the same few hundred kernels nine times; at small batches the launches, not the
kernels, take the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Pass = Callable[[Tensor], dict[str, Tensor]]
"""Computes losses of windows `[b, T + 1]`, leaves gradients on the parameters, returns scalars."""

WARM_UPS = 3
"""Eager runs before recording: compilation, library handles and loss scales come into being in them."""


class GraphedPass:
    """A recorded `run` for micro-batches of one shape. Only what `run` does on the device is repeated."""

    def __init__(self, run: Pass, example: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Record `run` on `example`. The gradients of `parameters` are lost, random generators move on."""
        self.shape = example.shape
        self._batch = example.clone()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(self._batch)
                _drop_gradients(parameters)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self._graph, capture_error_mode="thread_local"
        ):  # NCCL watches from another thread
            self._values = run(self._batch)
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        _drop_gradients(parameters)

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Replay on `batch`; gradients are added to those that the parameters have."""
        self._batch.copy_(batch, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            elif parameter.grad is gradient:  # the graph has overwritten what it computed last time
                raise RuntimeError("gradients of the last replay must be taken over before the next one")
            else:
                parameter.grad.add_(gradient)
        return {name: value.clone() for name, value in self._values.items()}

    def keep_gradients(self) -> None:
        """Take the gradients out of the graph's memory, so that another replay can add to them."""
        for parameter, gradient in self._gradients:
            if gradient is not None and parameter.grad is gradient:
                parameter.grad = gradient.clone()


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
