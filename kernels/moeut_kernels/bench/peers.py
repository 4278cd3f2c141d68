"""Who else computes a sigma-MoE feedforward: PyTorch paths, loops, and published packages where they are installed.

Each is handed the operands of a `Feedforward` in the layout and dtype that it wants, and returns a function from
(x, gate, w_up, w_down) to the output. Routing is given as chosen experts: sorting is part of everybody's time. Packages
are called as their own layers call themselves; whoever computes something else fails the check against float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import moeut_kernels as mk
from moeut_kernels.bench.layers import Feedforward
from moeut_kernels.bench.loop import looped_feedforward

Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """An implementation; `prepare(layer)` returns what computes it."""

    name: str
    prepare: Callable[[Feedforward], Compute]
    package: str | None = None
    """What has to be importable."""
    gpu_only: bool = False
    weights: str = "rows"
    """Dtype of the weights: "rows", that of x, or "float32"."""
    transposed: tuple[str, ...] = ()
    """Which of "up" and "down" it stores column by column."""
    autocast: bool = False


def _ours(backend: str, layer: Feedforward) -> Compute:
    n_experts = layer.shape.n_experts

    def compute(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        with mk.use_backend(backend):
            plan = mk.plan(layer.index, n_experts)
            return mk.expert_feedforward(x, w_up, w_down, plan, gate, casts=layer.casts)

    return compute


def _loop(indexed: bool, layer: Feedforward) -> Compute:
    return lambda x, gate, w_up, w_down: looped_feedforward(
        x, w_up, w_down, layer.index, gate, indexed=indexed
    )


def _scattermoe(layer: Feedforward) -> Compute:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    index, n_experts = layer.index[:, 0], layer.shape.n_experts

    def compute(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        order = flatten_sort_count(index, num_experts=n_experts)
        hidden = torch.relu(parallel_linear(x, w_up, index.shape[1], *order, grouped_out=True))
        return parallel_linear(hidden, w_down, 1, *order, grouped_in=True, gates=gate[:, 0].to(x.dtype))

    return compute


def _sonicmoe(layer: Feedforward) -> Compute:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import TC_topk_router_metadata, _DownProjection, _UpProjection

    index, shape = layer.index[:, 0], layer.shape
    relu, stream = ActivationType.RELU, torch.cuda.current_stream().cuda_stream
    n, k = shape.n_tokens, shape.top_k

    def compute(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        ends = torch.bincount(index.flatten(), minlength=shape.n_experts).cumsum(0).int()
        offsets, *order = TC_topk_router_metadata(index.int(), ends, k)
        up, down = (w.permute(2, 1, 0) for w in (w_up, w_down))
        hidden, kept = _UpProjection.apply(x, up, None, offsets, n * k, k, stream, *order, False, relu, False)
        return _DownProjection.apply(
            hidden, kept, down, None, gate[:, 0].float(), offsets, n, k, stream, *order, False, relu
        )

    return compute


def _megablocks(layer: Feedforward) -> Compute:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    shape = layer.shape
    experts = ParallelDroplessMLP(
        Arguments(
            hidden_size=shape.d_model, ffn_hidden_size=shape.d_expert, moe_num_experts=shape.n_experts,
            moe_top_k=shape.top_k, moe_loss_weight=0, activation_fn=torch.relu, mlp_type="mlp", mlp_impl="grouped",
            bias=False, fp16=False, bf16=True, device=torch.device(layer.x.device),
        )
    )  # fmt: skip
    scores = torch.zeros(shape.n_tokens, shape.n_experts, device=layer.x.device, dtype=layer.x.dtype)

    def compute(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        for name, weight in (("w1", w_up.transpose(1, 2)), ("w2", w_down)):
            delattr(experts.mlp, name)
            setattr(experts.mlp, name, weight.reshape(-1, shape.d_model))
        out = experts(x.unsqueeze(1), scores, gate[:, 0].to(x.dtype), layer.index[:, 0])
        return (out[0] if isinstance(out, tuple) else out).view(x.shape)

    return compute


def _official(layer: Feedforward) -> Compute:
    from moeut.cvmm import cvmm, cvmm_prepare_sel2

    def compute(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        up = cvmm_prepare_sel2(layer.index[:, 0].int())
        hidden = torch.relu(cvmm(x, up, w_up))
        down = up.clone()
        down.reduction_weight, down.sel_index, down.out_index = gate[:, 0], up.out_index, None
        return cvmm(hidden, down, w_down)

    return compute


CONTENDERS = (
    Contender("moeut_kernels triton", partial(_ours, "triton"), "triton", gpu_only=True, weights="float32"),
    Contender("moeut_kernels grouped_mm", partial(_ours, "grouped_mm"), weights="float32"),
    Contender("moeut_kernels torch", partial(_ours, "torch"), weights="float32"),
    Contender("loop", partial(_loop, False)),
    Contender("loop_indexed", partial(_loop, True)),
    Contender("scattermoe", _scattermoe, "scattermoe", gpu_only=True, transposed=("up", "down")),
    Contender("megablocks", _megablocks, "megablocks", gpu_only=True, transposed=("up",)),
    Contender("sonic-moe", _sonicmoe, "sonicmoe", gpu_only=True, transposed=("up", "down")),
    Contender("official moeut", _official, "moeut", gpu_only=True, weights="float32", autocast=True),
)
"""Ours first, the back end that runs by default before the others of its device."""
