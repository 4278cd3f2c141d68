"""What every kernel test shares: the ops written as dense einsums in float64, fresh random cases, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import moeut_kernels as mk
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

HIDDEN = {
    "relu": torch.relu,
    "gelu": gelu,
    "silu": silu,
    "swiglu": lambda z: silu(z[..., : z.shape[-1] // 2]) * z[..., z.shape[-1] // 2 :],
    "geglu": lambda z: gelu(z[..., : z.shape[-1] // 2]) * z[..., z.shape[-1] // 2 :],
}


def combine(index: Tensor, gate: Tensor | None, n_experts: int) -> Tensor:
    """[N, H, K] choices as dense gates [N, H, E]."""
    gate = torch.ones(index.shape, dtype=torch.float64) if gate is None else gate
    return torch.zeros(*index.shape[:2], n_experts, dtype=gate.dtype).scatter_add(2, index.long(), gate)


def dense_split(x, weight, index, gate, bias):
    every = torch.einsum("nd,edf->nef", x, weight) + (0 if bias is None else bias)
    return torch.einsum("nhe,nef->nhf", combine(index, gate, weight.shape[0]), every)


def dense_merge(x, weight, index, gate, bias):
    every = torch.einsum("nhd,edf->nhef", x, weight) + (0 if bias is None else bias)
    return torch.einsum("nhe,nhef->nf", combine(index, gate, weight.shape[0]), every)


def dense_feedforward(x, w_up, w_down, index, gate, b_up, b_down, activation):
    hidden = HIDDEN[activation](torch.einsum("nd,edf->nef", x, w_up) + (0 if b_up is None else b_up))
    every = torch.einsum("nef,efg->neg", hidden, w_down) + (0 if b_down is None else b_down)
    return torch.einsum("nhe,neg->ng", combine(index, gate, w_up.shape[0]), every)


@dataclass
class Case:
    """One op with float64 operands. Absent gate or bias: None."""

    op: str
    index: Tensor
    n_experts: int
    operands: dict[str, Tensor | None]
    activation: str = "relu"
    grads: dict[str, Tensor] = field(default_factory=dict)

    def define(self, operands: dict[str, Tensor | None]) -> Tensor:
        o, index = operands, self.index
        if self.op == "feedforward":
            return dense_feedforward(
                o["x"], o["w_up"], o["w_down"], index, o["gate"], o["b_up"], o["b_down"], self.activation
            )
        return (dense_split if self.op == "split" else dense_merge)(
            o["x"], o["weight"], index, o["gate"], o["bias"]
        )

    def run(self, operands: dict[str, Tensor | None], plan: mk.Plan | None = None) -> Tensor:
        o = operands
        plan = mk.plan(self.index.to(o["x"].device), self.n_experts) if plan is None else plan
        if self.op == "feedforward":
            return mk.expert_feedforward(
                o["x"],
                o["w_up"],
                o["w_down"],
                plan,
                o["gate"],
                activation=self.activation,
                b_up=o["b_up"],
                b_down=o["b_down"],
            )
        return (mk.expert_split if self.op == "split" else mk.expert_merge)(
            o["x"], o["weight"], plan, o["gate"], o["bias"]
        )


def choose(
    n_tokens: int, n_groups: int, n_experts: int, top_k: int, routing: str, generator: torch.Generator
) -> Tensor:
    """Distinct experts per row. "one": everybody starts with expert 0; "few": only the first top_k experts are ever used."""
    scores = torch.rand(n_tokens, n_groups, n_experts, generator=generator)
    if routing == "one":
        scores[..., 0] += 2
    if routing == "few":
        scores[..., :top_k] += 2
    return scores.topk(top_k, -1)[1]


def make_case(
    op: str, *, n_tokens=9, n_groups=1, top_k=2, n_experts=5, d_in=6, d_hidden=4, d_out=7, activation="relu",
    gated=True, biased=False, routing="random", seed=0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = choose(n_tokens, n_groups, n_experts, top_k, routing, generator)
    gate = torch.rand(index.shape, generator=generator, dtype=torch.float64) + 0.1 if gated else None
    if op == "feedforward":
        width = d_hidden * (2 if activation in ("swiglu", "geglu") else 1)
        operands = {
            "x": normal(n_tokens, d_in),
            "w_up": normal(n_experts, d_in, width) / d_in**0.5,
            "w_down": normal(n_experts, d_hidden, d_out) / d_hidden**0.5,
            "gate": gate,
            "b_up": normal(n_experts, width) if biased else None,
            "b_down": normal(n_experts, d_out) if biased else None,
        }
    else:
        operands = {
            "x": normal(n_tokens, d_in) if op == "split" else normal(n_tokens, n_groups, d_in),
            "weight": normal(n_experts, d_in, d_out) / d_in**0.5,
            "gate": gate,
            "bias": normal(n_experts, d_out) if biased else None,
        }
    return Case(op, index, n_experts, operands, activation)


def as_leaves(operands: dict[str, Tensor | None], **kwargs) -> dict[str, Tensor | None]:
    return {k: None if v is None else v.detach().to(**kwargs).requires_grad_() for k, v in operands.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expectation; infinite for NaN or a missed zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double()
    assert actual.shape == expected.shape
    difference, scale = (actual - expected).norm().item(), expected.norm().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale and difference == difference else float("inf")


def compare(
    case: Case,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    bound: float,
    leaves=None,
    cotangent_dtype=None,
    plan=None,
) -> None:
    """Output and every gradient of the op against the dense definition in float64, on operands rounded to `dtype`."""
    leaves = as_leaves(case.operands, dtype=dtype, device=device) if leaves is None else leaves
    exact = as_leaves({k: None if v is None else v.cpu() for k, v in leaves.items()}, dtype=torch.float64)
    expected, actual = case.define(exact), case.run(leaves, plan)
    assert actual.dtype == leaves["x"].dtype
    cotangent = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    names = [k for k, v in leaves.items() if v is not None]
    wanted = torch.autograd.grad(expected, [exact[k] for k in names], cotangent.double())
    got = torch.autograd.grad(actual, [leaves[k] for k in names], cotangent.to(device))
    errors = {"output": relative_error(actual, expected)}
    errors |= {f"d_{k}": relative_error(g, w) for k, g, w in zip(names, got, wanted, strict=True)}
    assert all(g.dtype == leaves[k].dtype for k, g in zip(names, got, strict=True))
    sizes = {"output": actual.numel(), **{f"d_{k}": g.numel() for k, g in zip(names, got, strict=True)}}
    # a norm over few numbers in half precision can be small by chance, while its rounding errors are not
    loose = {k: 3 if bound > 1e-3 and size < 512 else 1 for k, size in sizes.items()}
    worst = {k: e for k, e in errors.items() if not e <= bound * loose[k]}
    assert not worst, f"{case.op} {case.activation} {dtype}: {worst} above {bound}"


@pytest.fixture
def cases():
    """The helpers of this file: test modules need no import path to reach them."""
    return SimpleNamespace(
        make=make_case, leaves=as_leaves, compare=compare, error=relative_error, choose=choose, Case=Case
    )


@pytest.fixture
def nan_filled_empty(monkeypatch):
    """Fresh memory holds NaN (integers: a large value), so that an unwritten output cannot pass."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        return tensor.fill_(
            float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
        )

    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))


@pytest.fixture
def on_triton(nan_filled_empty):
    """Products run on Triton; what a kernel does not write is NaN."""
    with mk.use_backend("triton"):
        yield
