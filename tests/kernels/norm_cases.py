"""A layer between two norms, written twice: with sums, norms and casts apart, and through `norm_fan`."""

from __future__ import annotations

from collections.abc import Callable

import moeut_kernels as mk
import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
N_EXPERTS = 5


def make_layer(
    *,
    n_tokens: int,
    width: int,
    n_heads: int,
    top_k: int = 2,
    d_head: int = 16,
    d_expert: int = 16,
    seed: int = 0,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Operands in float64, and chosen experts of values, outputs and feedforward."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, h, k = n_tokens, n_heads, top_k
    operands = {
        "x": draw(n, width),
        "weight1": draw(width),
        "bias1": draw(width),
        "weight2": draw(width),
        "value": draw(h * N_EXPERTS, width, d_head) / width**0.5,
        "output": draw(h * N_EXPERTS, d_head, width) / d_head**0.5,
        "up": draw(N_EXPERTS, width, d_expert) / width**0.5,
        "down": draw(N_EXPERTS, d_expert, width) / d_expert**0.5,
        **{name: draw(n, h, k).sigmoid() for name in ("value_gate", "output_gate")},
        "gate": draw(n, 1, k).sigmoid(),
    }

    def choose(groups: int) -> Tensor:
        local = torch.rand(n, groups, N_EXPERTS, generator=g).topk(k, -1)[1]
        return local + N_EXPERTS * torch.arange(groups)[:, None]

    return operands, (choose(h), choose(h), choose(1))


def run_layer(
    o: dict[str, Tensor], chosen: tuple[Tensor, ...], *, fanned: bool, center: bool = True
) -> Tensor:
    """Values of one norm's data, outputs of them, experts behind the other; both norms are read as routers would."""
    plans = [
        mk.plan(index, n * N_EXPERTS)
        for index, n in zip(chosen, (index.shape[1] for index in chosen), strict=True)
    ]
    n_heads, bias = chosen[0].shape[1], o["bias1"] if center else None
    if fanned:
        fan = mk.norm_fan(
            o["x"],
            o["weight1"],
            bias,
            eps=EPS,
            center=center,
            shares=mk.split_shares(o["x"], o["value"], n_heads),
        )
        normed, data, shares = fan.normed, fan.data, fan.shares
    else:
        normed, data, shares = _norm(o["x"], o["weight1"], bias, center), o["x"], None
    values = (
        mk.expert_split(data, o["value"], plans[0], o["value_gate"], shares=shares)
        * normed.mean(1)[:, None, None]
    )
    parts = mk.expert_merge(values, o["output"], plans[1], o["output_gate"], summed=not fanned)
    if fanned:
        fan = mk.norm_fan(
            fan.residual, o["weight2"], eps=EPS, center=center, addend=parts,
            shares=mk.feedforward_shares(o["x"], o["up"], chosen[2].shape[2]),
        )  # fmt: skip
        normed, data, shares, residual = fan.normed, fan.data, fan.shares, fan.residual
    else:
        residual = o["x"] + parts
        normed, data = _norm(residual, o["weight2"], None, center), residual
    gate = o["gate"] * (1 + normed.square().mean(1)[:, None, None])
    return mk.expert_feedforward(data, o["up"], o["down"], plans[2], gate, residual=residual, shares=shares)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, center: bool) -> Tensor:
    if center:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
    return F.rms_norm(x, weight.shape, weight, EPS)


def gradients(
    operands: dict[str, Tensor], chosen: tuple[Tensor, ...], *, fanned: bool, center: bool, dtype: torch.dtype,
    device: str, run: Callable[..., Tensor] = run_layer,
) -> dict[str, Tensor]:  # fmt: skip
    """The output and all gradients; `dtype` multiplies, as under autocast, where it is shorter than float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    o = {name: t.detach().clone().to(device, wide).requires_grad_() for name, t in operands.items()}
    chosen = tuple(index.to(device) for index in chosen)
    with torch.autocast(device, dtype, enabled=dtype != wide):
        out = run(o, chosen, fanned=fanned, center=center)
    ramp = torch.linspace(-1, 1, out.numel(), device=device, dtype=out.dtype).view_as(out)
    (out * ramp.cos()).sum().backward()
    unused = {"bias1"} if not center else set()
    return {"out": out.detach()} | {name: t.grad for name, t in o.items() if name not in unused}
