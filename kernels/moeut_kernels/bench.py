"""Time the expert layers on one GPU: correctness against float64 first, then medians of CUDA graph replays.

    python -m moeut_kernels.bench                     # layers: table, and JSON with --json FILE
    python -m moeut_kernels.bench --parts             # every kernel of the layers by itself
    python -m moeut_kernels.bench --tune gather walk  # other tiles for the named products

A layer's time has routing preparation (sort, tile tables) in it and float32 weight gradients, from bfloat16 rows and
weights. Data is random and new every run. The spread is the 10th to the 90th percentile.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import moeut_kernels as mk


@dataclass(frozen=True)
class FeedforwardShape:
    """A sigma-MoE feedforward layer."""

    name: str
    n_tokens: int
    d_model: int
    n_experts: int
    d_expert: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of one product, 2 x MACs: a layer has two forward and four backward."""
        return 2 * self.n_tokens * self.top_k * self.d_model * self.d_expert


@dataclass(frozen=True)
class AttentionShape:
    """Value and output projections of a SwitchHead layer, two active experts a head."""

    name: str
    n_tokens: int
    d_model: int
    n_heads: int
    d_head: int
    n_experts: int

    @property
    def flops(self) -> int:
        return 2 * self.n_tokens * self.n_heads * 2 * self.d_model * self.d_head


FEEDFORWARDS = (
    FeedforwardShape("244m", 8192, 1024, 387, 128, 16),
    FeedforwardShape("244m", 32768, 1024, 387, 128, 16),
    FeedforwardShape("1b", 32768, 1536, 565, 128, 24),
)
ATTENTIONS = (AttentionShape("244m", 8192, 1024, 4, 128, 10), AttentionShape("244m", 32768, 1024, 4, 128, 10))


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def time_graph(run: Callable[[], object], *, repeats: int = 20) -> Timing:
    """Capture `run` in a CUDA graph and time its replays: device time without launch gaps from Python."""
    stream = torch.cuda.Stream()
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
    times = sorted(start.elapsed_time(end) for start, end in events)
    return Timing(times[repeats // 2], times[repeats // 10], times[-1 - repeats // 10])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expectation."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


class Feedforward:
    """Operands of a feedforward layer on the GPU, and its forward and backward."""

    def __init__(self, shape: FeedforwardShape) -> None:
        n, d, e, f, k = shape.n_tokens, shape.d_model, shape.n_experts, shape.d_expert, shape.top_k
        half = {"device": "cuda", "dtype": torch.bfloat16}
        self.shape = shape
        self.index = torch.rand(n, 1, e, device="cuda").topk(k, -1)[1]
        self.x = torch.randn(n, d, **half).requires_grad_()
        self.gate = (torch.rand(n, 1, k, device="cuda") * 0.9 + 0.05).requires_grad_()
        self.w_up = (torch.randn(e, d, f, device="cuda") / d**0.5).requires_grad_()
        self.w_down = (torch.randn(e, f, d, device="cuda") / (f * k) ** 0.5).requires_grad_()
        self.casts = mk.cast_weights(self.w_up, self.w_down, dtype=torch.bfloat16)
        self.grad = torch.randn(n, d, **half)

    def forward(self) -> Tensor:
        plan = mk.plan(self.index, self.shape.n_experts)
        return mk.expert_feedforward(self.x, self.w_up, self.w_down, plan, self.gate, casts=self.casts)

    def both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return out, *torch.autograd.grad(out, (self.x, self.gate, self.w_up, self.w_down), self.grad)

    def exact(self) -> tuple[Tensor, ...]:
        """The layer in float64, one expert after the other, from the same rounded operands."""
        x, gate = (t.detach().double().requires_grad_() for t in (self.x, self.gate))
        w_up, w_down = (t.double().requires_grad_() for t in self.casts)
        out = torch.zeros_like(x)
        for expert in range(self.shape.n_experts):
            token, choice = (self.index[:, 0] == expert).nonzero(as_tuple=True)
            hidden = torch.relu(x[token] @ w_up[expert])
            out = out.index_add(0, token, (hidden @ w_down[expert]) * gate[token, 0, choice, None])
        return out, *torch.autograd.grad(out, (x, gate, w_up, w_down), self.grad.double())


class Attention:
    """Operands of SwitchHead's value and output projections, with a routing of each."""

    def __init__(self, shape: AttentionShape) -> None:
        n, d, h, f = shape.n_tokens, shape.d_model, shape.n_heads, shape.d_head
        half = {"device": "cuda", "dtype": torch.bfloat16}
        self.shape, self.n_experts = shape, h * shape.n_experts
        first = torch.arange(h, device="cuda")[:, None] * shape.n_experts
        self.indices = [
            torch.rand(n, h, shape.n_experts, device="cuda").topk(2, -1)[1] + first for _ in range(2)
        ]
        self.gates = [(torch.rand(n, h, 2, device="cuda") * 0.9 + 0.05).requires_grad_() for _ in range(2)]
        self.x = torch.randn(n, d, **half).requires_grad_()
        self.mixed = torch.randn(n, h, f, **half).requires_grad_()
        self.values = (torch.randn(self.n_experts, d, f, device="cuda") / d**0.5).requires_grad_()
        self.outputs = (
            torch.randn(self.n_experts, f, d, device="cuda") / (f * h * 2) ** 0.5
        ).requires_grad_()
        self.casts = mk.cast_weights(self.values, self.outputs, dtype=torch.bfloat16)
        self.grads = (torch.randn(n, h, f, **half), torch.randn(n, d, **half))

    def forward(self) -> tuple[Tensor, Tensor]:
        plans = [mk.plan(index, self.n_experts, disjoint=True) for index in self.indices]
        values = mk.expert_split(self.x, self.values, plans[0], self.gates[0], cast=self.casts[0])
        outputs = mk.expert_merge(self.mixed, self.outputs, plans[1], self.gates[1], cast=self.casts[1])
        return values, outputs

    def both(self) -> tuple[Tensor, ...]:
        out = self.forward()
        leaves = (self.x, self.mixed, *self.gates, self.values, self.outputs)
        return *out, *torch.autograd.grad(out, leaves, self.grads)

    def exact(self) -> tuple[Tensor, ...]:
        """Both projections in float64, one expert after the other, from the same rounded operands."""
        x, mixed, *gates = (t.detach().double().requires_grad_() for t in (self.x, self.mixed, *self.gates))
        weights = [t.double().requires_grad_() for t in self.casts]
        n_tokens, n_heads, d_head = self.mixed.shape
        values, outputs = x.new_zeros(n_tokens * n_heads, d_head), torch.zeros_like(x)
        for expert in range(self.n_experts):
            token, head, choice = (self.indices[0] == expert).nonzero(as_tuple=True)
            term = (x[token] @ weights[0][expert]) * gates[0][token, head, choice, None]
            values = values.index_add(0, token * n_heads + head, term)
            token, head, choice = (self.indices[1] == expert).nonzero(as_tuple=True)
            term = (mixed[token, head] @ weights[1][expert]) * gates[1][token, head, choice, None]
            outputs = outputs.index_add(0, token, term)
        out = (values.view(n_tokens, n_heads, d_head), outputs)
        leaves = (x, mixed, *gates, *weights)
        return *out, *torch.autograd.grad(out, leaves, tuple(g.double() for g in self.grads))


def check(layer: Feedforward | Attention, bound: float = 4e-3) -> float:
    """Largest relative error of outputs and gradients against float64; exits where it is above the bound."""
    errors = [relative_error(a, b) for a, b in zip(layer.both(), layer.exact(), strict=True)]
    if not max(errors) <= bound:
        sys.exit(f"{type(layer).__name__} {layer.shape.name}: errors {errors} above {bound}: not timed")
    return max(errors)


def layers() -> Iterable[dict[str, Any]]:
    """Forward, and forward + backward of each layer with its routing preparation."""
    small = [
        FeedforwardShape("244m", 2048, 1024, 387, 128, 16),
        FeedforwardShape("1b", 1024, 1536, 565, 128, 24),
    ]
    errors: dict[type, float] = {Feedforward: max(check(Feedforward(shape)) for shape in small)}
    errors[Attention] = check(Attention(AttentionShape("244m", 4096, 1024, 4, 128, 10)))
    shapes = (*FEEDFORWARDS, *ATTENTIONS)
    for shape in shapes:
        layer = Feedforward(shape) if isinstance(shape, FeedforwardShape) else Attention(shape)
        with torch.no_grad():
            forward = time_graph(layer.forward)
        both = time_graph(layer.both)
        yield {
            "layer": type(layer).__name__.lower(),
            **asdict(shape),
            "forward_ms": forward.median,
            "forward_backward_ms": both.median,
            "spread_ms": [both.low, both.high],
            "tflops": 6 * shape.flops / both.median / 1e9,
            "largest_error": errors[type(layer)],
        }
        del layer
        torch.cuda.empty_cache()


def parts() -> dict[str, Callable[[], object]]:
    """Every kernel of the layers at 32768 tokens of the 244M shape, by product name and use."""
    from moeut_kernels import triton_feedforward as ff
    from moeut_kernels import triton_pairs as pairs
    from moeut_kernels import triton_rows as rows
    from moeut_kernels import triton_sums as sums

    layer = Feedforward(FEEDFORWARDS[1])
    x, grad, gate, (up, down) = layer.x.detach(), layer.grad, layer.gate.detach(), layer.casts
    plan = mk.plan(layer.index, layer.shape.n_experts)
    _, slots, position, offsets, tiles = plan.tensors
    n, k = layer.shape.n_tokens, layer.shape.top_k
    hidden, none = torch.randn(n * k, 128, device="cuda").bfloat16().relu(), x.new_empty(0)
    products = torch.randn(n * k, 1024, device="cuda", dtype=torch.bfloat16)
    d_up, d_down = torch.empty(up.shape, device="cuda"), torch.empty(down.shape, device="cuda")
    logits = torch.randn(n, 392, device="cuda", dtype=torch.bfloat16)

    attention = Attention(ATTENTIONS[1])
    routes = [mk.plan(index, attention.n_experts, disjoint=True) for index in attention.indices]
    of_pairs = [
        (g.detach(), r.index, r.position, *r.pairs) for g, r in zip(attention.gates, routes, strict=True)
    ]
    values, outputs = attention.casts
    xa, mixed = attention.x.detach(), attention.mixed.detach().flatten(0, 1)
    d_values, d_outputs = attention.grads[0].flatten(0, 1), attention.grads[1]
    kept = torch.randn(2 * mixed.shape[0], 128, device="cuda", dtype=torch.bfloat16)
    d_weight = torch.empty(values.shape, device="cuda")
    partial = torch.randn(mixed.shape[0], 1024, device="cuda", dtype=torch.bfloat16)
    return {
        "routing feedforward": lambda: mk.plan(layer.index, layer.shape.n_experts),
        "topk sigmoid": lambda: mk.topk_sigmoid(logits, k, 387),
        "gather up": lambda: rows.grouped_rows(x, up, slots, tiles, per_row=k, kind="relu", gate=gate),
        "walk down": lambda: rows.ordered_rows(hidden, down, slots, tiles),
        "sum": lambda: sums.gather_sum(products, position, n, k),
        "gather_backward": lambda: ff.backward_hidden(
            grad, down, gate, hidden, none, slots, tiles, k, "relu"
        ),
        "walk dx": lambda: rows.ordered_rows(hidden, up, slots, tiles, transposed=True),
        "weight up": lambda: rows.weight_gradient(
            [x], [hidden], [slots], [offsets], per_left=k, per_right=None, out=d_up
        ),
        "weight down": lambda: rows.weight_gradient(
            [hidden], [grad], [slots], [offsets], per_left=None, per_right=k, out=d_down
        ),
        "weight_uses up": lambda: rows.weight_gradient(
            [x] * 9, [hidden] * 9, [slots] * 9, [offsets] * 9, per_left=k, per_right=None, out=d_up
        ),
        "routing attention": lambda: mk.plan(attention.indices[0], attention.n_experts, disjoint=True),
        "pair_narrow values": lambda: pairs.narrow(xa, values, *of_pairs[0], per_row=4, keep=True),
        "pair_wide outputs": lambda: pairs.wide(mixed, outputs, *of_pairs[1]),
        "sum heads": lambda: sums.gather_sum(partial, None, n, 4),
        "pair_narrow_backward outputs": lambda: pairs.narrow(
            d_outputs, outputs, *of_pairs[1], per_row=4, transposed=True, other=mixed
        ),
        "pair_wide values backward": lambda: pairs.wide(
            d_values, values, *of_pairs[0], transposed=True, products=kept
        ),
        "weight values": lambda: rows.weight_gradient(
            [xa], [kept], [routes[0].slots], [routes[0].offsets], per_left=8, per_right=None, out=d_weight
        ),
    }


# Rows, columns, depth, warps, stages of the tiles that `--tune` times.
CANDIDATES: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "gather": (
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 32, 4, 5), (64, 128, 64, 4, 4),
    ),
    "gather_backward": (
        (64, 128, 64, 4, 4), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (64, 128, 32, 4, 6), (64, 128, 128, 4, 3),
    ),
    "walk": (
        (64, 128, 0, 4, 4), (64, 128, 0, 4, 3), (128, 128, 0, 4, 3), (128, 128, 0, 8, 3), (64, 256, 0, 8, 3),
        (64, 64, 0, 4, 4), (128, 64, 0, 4, 3), (64, 128, 0, 8, 4),
    ),
    "weight": (
        (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 32, 4, 5), (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4), (256, 128, 32, 8, 5), (128, 64, 64, 4, 4), (128, 128, 128, 8, 3), (256, 64, 64, 4, 4),
    ),
    "pair_narrow": (
        (128, 128, 32, 8, 6), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4),
        (64, 128, 64, 8, 4), (64, 128, 32, 4, 5),
    ),
    "pair_wide": (
        (128, 64, 512, 8, 3), (128, 64, 1024, 8, 3), (128, 64, 256, 8, 3), (128, 128, 512, 8, 2), (64, 64, 512, 4, 3),
        (64, 64, 1024, 4, 4), (128, 64, 512, 8, 4), (64, 128, 512, 8, 2), (128, 32, 512, 8, 4), (64, 64, 512, 8, 3),
    ),
}  # fmt: skip
CANDIDATES["weight_uses"] = CANDIDATES["weight"]
CANDIDATES["pair_narrow_backward"] = CANDIDATES["pair_narrow"]


def tune(products: list[str]) -> Iterable[dict[str, Any]]:
    """Time other tiles for the parts of the named products."""
    from moeut_kernels.triton_tiles import Tile, override, tile

    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    for name, run in parts().items():
        product = name.split()[0]
        if product not in products:
            continue
        best = tile(product, like)
        for sizes in CANDIDATES[product]:
            with override(product, Tile(*sizes)):
                record = {"part": name, "tile": str(sizes), "now": Tile(*sizes) == best}
                try:
                    record["ms"] = time_graph(run, repeats=10).median
                except RuntimeError as error:  # more shared memory than a block may use
                    record["error"] = str(error)[:60]
                yield record


def table(records: list[dict[str, Any]]) -> str:
    """Records as aligned columns."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [columns] + [[_cell(record.get(c)) for c in columns] for record in records]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_cell(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", action="store_true", help="time every kernel by itself")
    parser.add_argument("--tune", nargs="+", metavar="PRODUCT", help="time other tiles for these products")
    parser.add_argument("--json", metavar="FILE", help="also write the records and the device to FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("moeut_kernels.bench needs a CUDA device")
    if arguments.tune:
        records = list(tune(arguments.tune))
        records.sort(key=lambda r: (r["part"], r.get("ms", 1e9)))
    elif arguments.parts:
        records = []
        for name, run in parts().items():
            timing = time_graph(run)
            records.append({"part": name, "ms": timing.median, "spread_ms": [timing.low, timing.high]})
    else:
        records = list(layers())
    print(table(records))  # noqa: T201
    if arguments.json:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with open(arguments.json, "w") as file:
            json.dump({**device, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
