"""Every kernel of the layers by itself, and the tiles that may be tried with it."""

from collections.abc import Callable
from dataclasses import replace

import torch

import moeut_kernels as mk
from moeut_kernels.bench.layers import ATTENTIONS, FEEDFORWARDS, Attention, Feedforward


def parts(n_tokens: int = 32768) -> dict[str, Callable[[], object]]:
    """Every kernel of the layers of the 244M shape, by product name and use."""
    from moeut_kernels import triton_feedforward as ff
    from moeut_kernels import triton_gradients as gradients
    from moeut_kernels import triton_pairs as pairs
    from moeut_kernels import triton_rows as rows
    from moeut_kernels import triton_sums as sums

    layer = Feedforward(replace(FEEDFORWARDS[1], n_tokens=n_tokens))
    x, grad, gate, (up, down) = layer.x.detach(), layer.grad, layer.gate.detach(), layer.casts
    plan = mk.plan(layer.index, layer.shape.n_experts)
    _, slots, position, offsets, tiles = plan.tensors
    n, k = layer.shape.n_tokens, layer.shape.top_k
    hidden, none = torch.randn(n * k, 128, device="cuda").bfloat16().relu(), x.new_empty(0)
    products = torch.randn(n * k, 1024, device="cuda", dtype=torch.bfloat16)
    d_up, d_down = torch.empty(up.shape, device="cuda"), torch.empty(down.shape, device="cuda")
    logits = torch.randn(n, 392, device="cuda", dtype=torch.bfloat16)

    attention = Attention(replace(ATTENTIONS[1], n_tokens=n_tokens))
    routes = [mk.plan(index, attention.n_experts, disjoint=True) for index in attention.indices]
    of_pairs = [
        (g.detach(), r.low_slots, r.position, r.pair_tiles)
        for g, r in zip(attention.gates, routes, strict=True)
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
        "weight up": lambda: gradients.weight_gradient(
            [x], [hidden], [slots], [offsets], per_left=k, per_right=None, out=d_up
        ),
        "weight down": lambda: gradients.weight_gradient(
            [hidden], [grad], [slots], [offsets], per_left=None, per_right=k, out=d_down
        ),
        "weight_uses up": lambda: gradients.weight_gradient(
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
        "weight values": lambda: gradients.weight_gradient(
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
        (64, 128, 0, 4, 2), (64, 128, 0, 4, 3), (64, 128, 0, 8, 2), (64, 128, 0, 8, 3), (128, 128, 0, 8, 2),
        (128, 128, 0, 8, 3), (64, 64, 0, 4, 2), (64, 64, 0, 4, 3), (64, 64, 0, 4, 4), (128, 64, 0, 4, 2),
        (128, 64, 0, 8, 3), (32, 128, 0, 4, 3), (64, 256, 0, 8, 2), (128, 64, 0, 8, 2),
    ),
}  # fmt: skip
CANDIDATES["weight_uses"] = CANDIDATES["weight"]
CANDIDATES["pair_narrow_backward"] = CANDIDATES["pair_narrow"]
