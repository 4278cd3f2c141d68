"""One feedforward layer, everybody's kernels: checked against float64, then timed in turn in one process."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moeut_kernels.bench.layers import FEEDFORWARDS, Feedforward, FeedforwardShape, relative_error
from moeut_kernels.bench.peers import CONTENDERS, Compute, Contender
from moeut_kernels.bench.timing import time_in_turn

SHAPES = {
    "tiny": FeedforwardShape("tiny", 2048, 128, 96, 32, 8),
    "244m": FEEDFORWARDS[1],
    "1b": FEEDFORWARDS[2],
}
"""`tiny` is that of `moeut_tiny` at the batch of the quickstart."""

BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
CHECKED_TOKENS = 2048
"""The check takes at most this many tokens: float64 is slow."""

_FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
"""What a package of another version, or a kernel on another device, may raise."""


@dataclass(frozen=True)
class Result:
    """What became of one implementation; times are None unless `status` is "timed"."""

    implementation: str
    status: str
    """timed, "not installed", "needs a GPU", "does not run" or "wrong"."""
    why: str | None = None
    largest_error: float | None = None
    """Relative Frobenius error against float64, the largest of the output and the four gradients."""
    forward_ms: float | None = None
    forward_spread_ms: tuple[float, float] | None = None
    forward_backward_ms: float | None = None
    """Sorting included; weight gradients in the dtype of the weights: float32 for ours and the official package."""
    forward_backward_spread_ms: tuple[float, float] | None = None
    """10th and 90th percentile."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Prepared:
    """A contender with operands of its own dtype."""

    def __init__(self, contender: Contender, layer: Feedforward) -> None:
        self.autocast, self.grad = contender.autocast, layer.grad
        up, down = (layer.w_up, layer.w_down) if contender.weights == "float32" else layer.casts
        up = _transposed(up) if "up" in contender.transposed else up
        down = _transposed(down) if "down" in contender.transposed else down
        self.leaves = [t.detach().requires_grad_() for t in (layer.x, layer.gate, up, down)]
        self.compute: Compute = contender.prepare(layer)

    def forward(self) -> Tensor:
        device = self.grad.device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            return self.compute(*self.leaves)

    def forward_only(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return out, *torch.autograd.grad(out, self.leaves, self.grad.to(out.dtype))


def _transposed(weight: Tensor) -> Tensor:
    """The same matrices, stored column by column."""
    return weight.detach().mT.contiguous().mT


def compare(
    shape: FeedforwardShape,
    *,
    device: torch.device,
    repeats: int = 20,
    contenders: Sequence[Contender] = CONTENDERS,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Check and time everybody on random data: bfloat16 on CUDA, float32 elsewhere. `tell` hears what is going on."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    small = replace(shape, n_tokens=min(shape.n_tokens, CHECKED_TOKENS))
    results = {
        contender.name: _checked(contender, Feedforward(small, str(device), dtype), dtype, tell)
        for contender in contenders
    }
    layer = Feedforward(shape, str(device), dtype)
    ready: dict[str, _Prepared] = {}
    for contender in contenders:
        if results[contender.name].status == "timed":
            ready[contender.name] = _Prepared(contender, layer)
    tell(f"timing {', '.join(ready)}")
    forward = time_in_turn({name: one.forward_only for name, one in ready.items()}, device, repeats=repeats)
    both = time_in_turn({name: one.both for name, one in ready.items()}, device, repeats=repeats)
    for name in ready:
        results[name] = replace(
            results[name],
            forward_ms=forward[name].median,
            forward_spread_ms=(forward[name].low, forward[name].high),
            forward_backward_ms=both[name].median,
            forward_backward_spread_ms=(both[name].low, both[name].high),
        )
    return list(results.values())


def _checked(
    contender: Contender, layer: Feedforward, dtype: torch.dtype, tell: Callable[[str], None]
) -> Result:
    """Whether a contender is there, runs, and computes the layer."""
    if contender.package is not None and find_spec(contender.package) is None:
        return Result(contender.name, "not installed", f"no package {contender.package}")
    if contender.gpu_only and layer.x.device.type != "cuda":
        return Result(contender.name, "needs a GPU")
    tell(f"checking {contender.name}")
    try:
        outputs = _Prepared(contender, layer).both()
    except _FAILURES as failure:
        reason = (str(failure).splitlines() or [""])[0]
        return Result(contender.name, "does not run", f"{type(failure).__name__}: {reason}")
    expected = layer.exact()
    if any(a.shape != b.shape for a, b in zip(outputs, expected, strict=True)):
        return Result(contender.name, "wrong", f"shapes {[tuple(a.shape) for a in outputs]}")
    error = max(relative_error(a, b) for a, b in zip(outputs, expected, strict=True))
    if not error <= BOUNDS[dtype]:
        return Result(contender.name, "wrong", f"error above {BOUNDS[dtype]:g}", error)
    return Result(contender.name, "timed", None, error)
