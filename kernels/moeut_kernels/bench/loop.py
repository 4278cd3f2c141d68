"""Experts one after the other in Python, as mixtures of experts are first written.

What grouped products are measured against; only benchmarks use it. For each expert: find its tokens, two products,
weigh, `index_add`; autograd does the rest. `LOOPS` has two forms. "loop" takes the stacked weights apart once, the best
a loop can do. "loop_indexed" reads `weight[expert]` inside the loop, as published code with stacked weights does: the
gradient of every such read is a matrix of zeros as large as all experts together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import moeut_kernels as mk
from moeut_kernels import activation as activations

LOOPS = ("loop", "loop_indexed")


@contextmanager
def loop_over_experts(form: str = "loop") -> Iterator[None]:
    """Replace the expert ops of `moeut_kernels` by loops inside the block, for models that call them by module.

    form: one of `LOOPS`. Raises `ValueError` for another. Deferred weight gradients are left out.
    """
    if form not in LOOPS:
        raise ValueError(f"form={form!r} is not one of {', '.join(LOOPS)}")
    indexed = form == "loop_indexed"

    def feedforward(x, w_up, w_down, plan, gate, **options):  # type: ignore[no-untyped-def]
        for name in ("casts", "tickets", "shares"):
            options.pop(name, None)
        residual = options.pop("residual", None)
        out = looped_feedforward(x, w_up, w_down, plan.index, gate, indexed=indexed, **options)
        return out if residual is None else residual + out

    def split(x, weight, plan, gate=None, bias=None, **copies):  # type: ignore[no-untyped-def]
        return looped_split(x, weight, plan.index, gate, bias, indexed=indexed)

    def merge(x, weight, plan, gate=None, bias=None, **copies):  # type: ignore[no-untyped-def]
        return looped_merge(x, weight, plan.index, gate, bias, indexed=indexed)

    replaced = {
        "plan": _unsorted,
        "expert_feedforward": feedforward,
        "expert_split": split,
        "expert_merge": merge,
    }
    originals = {name: getattr(mk, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(mk, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(mk, name, function)


def looped_feedforward(
    x: Tensor, w_up: Tensor, w_down: Tensor, index: Tensor, gate: Tensor, *, activation: str = "relu",
    b_up: Tensor | None = None, b_down: Tensor | None = None, indexed: bool = False,
) -> Tensor:  # fmt: skip
    """What `expert_feedforward` computes, with `index` [N, 1, K] in place of a plan."""
    ups, downs = _matrices(w_up, indexed), _matrices(w_down, indexed)
    out = x.new_zeros(x.shape[0], w_down.shape[2])
    for expert in range(w_up.shape[0]):
        token, group, choice = torch.where(index == expert)
        z = x[token] @ ups[expert].to(x.dtype)
        hidden = activations.apply(activation, z if b_up is None else z + b_up[expert])
        y = hidden @ downs[expert].to(x.dtype)
        y = y if b_down is None else y + b_down[expert]
        out.index_add_(0, token, (y * gate[token, group, choice, None]).to(out.dtype))
    return out


def looped_split(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor | None = None, bias: Tensor | None = None, *,
    indexed: bool = False,
) -> Tensor:  # fmt: skip
    """What `expert_split` computes, with `index` [N, H, K] in place of a plan."""
    matrices, n_groups = _matrices(weight, indexed), index.shape[1]
    out = x.new_zeros(x.shape[0] * n_groups, weight.shape[2])
    for expert in range(weight.shape[0]):
        token, group, choice = torch.where(index == expert)
        y = x[token] @ matrices[expert].to(x.dtype)
        y = y if bias is None else y + bias[expert]
        y = y if gate is None else y * gate[token, group, choice, None]
        out.index_add_(0, token * n_groups + group, y.to(out.dtype))
    return out.view(x.shape[0], n_groups, -1)


def looped_merge(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor | None = None, bias: Tensor | None = None, *,
    indexed: bool = False,
) -> Tensor:  # fmt: skip
    """What `expert_merge` computes, with `index` [N, H, K] in place of a plan."""
    matrices = _matrices(weight, indexed)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        token, group, choice = torch.where(index == expert)
        y = x[token, group] @ matrices[expert].to(x.dtype)
        y = y if bias is None else y + bias[expert]
        y = y if gate is None else y * gate[token, group, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _matrices(weight: Tensor, indexed: bool) -> Tensor | Sequence[Tensor]:
    return weight if indexed else weight.unbind(0)


def _unsorted(index: Tensor, n_experts: int, *, disjoint: bool = False) -> mk.Plan:
    """A plan that holds the choice alone: a loop needs no order."""
    none = index.new_empty(0, dtype=torch.int32)
    return mk.Plan(index, none, none, none.new_empty(n_experts + 1), none, none, none)
