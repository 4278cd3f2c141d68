"""The residual stream between two blocks: sum, norm and the copy that products read, and one gradient for all three.

A stream is added to, normalised for routers, cast for experts, and passed on. What comes back through these ways, the
unsummed rows of experts among it, is added up with the gradient of the norm in one pass. As in `deferral`, rows travel
as gradients of placeholders without memory: no gradient of the stream's size is written only to be added to another.
Legend: N tokens, D columns, H parts of an addend, R rows of a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeut_kernels.backend import resolve
from moeut_kernels.casting import compute_dtype, wide_float
from moeut_kernels.deferral import as_integers

WIDEST = 8192
"""Most columns: a program holds a whole row."""


class Shares(NamedTuple):
    """Placeholders through which an expert op hands back the rows of its input's gradient before they are added up.

    rows: [R, D'], D' >= D. position: [R] where rows are listed, as float32 with the bits of the integers: token n owns
    rows position[n · R / N : (n + 1) · R / N]. Empty where rows lie in the order of tokens.
    """

    rows: Tensor
    position: Tensor


class ShareShape(NamedTuple):
    """What of an input's gradient an expert op will hand back: `n_rows` rows of `width` columns, listed or in order."""

    n_rows: int
    width: int
    listed: bool


class Carried(NamedTuple):
    """A stream on its way to the next `norm_fan`, which alone may read it: its gradient goes to the placeholder."""

    stream: Tensor
    placeholder: Tensor


class Fan(NamedTuple):
    """What `norm_fan` makes of a stream."""

    normed: Tensor
    """[N, D] in the compute dtype."""
    data: Tensor
    """[N, D] the stream in the compute dtype, for products."""
    residual: Tensor | Carried
    """The stream: a tensor if something was added, else what the next `norm_fan` takes."""
    shares: Shares | None
    """For the one op that multiplies `data` by experts, if it was announced."""


def fans(x: Tensor) -> bool:
    """Whether `norm_fan` pays for a stream like `x` [..., D]: in training, where Triton runs, up to 8192 columns."""
    return (
        torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and x.is_floating_point()
        and 0 < x.shape[-1] <= WIDEST
        and resolve(x) == "triton"
    )


def norm_fan(
    x: Tensor | Carried,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    center: bool = True,
    addend: Tensor | None = None,
    shares: ShareShape | None = None,
) -> Fan:
    """Add to a residual stream, normalise it, and copy it in the compute dtype, in one pass.

        total = x + sum_h addend[:, h];  normed = (total - mean) / sqrt(variance + eps) · weight + bias

    x: [N, D], or what an earlier call carried on. weight, bias: [D]. center: layer normalisation (arXiv:1607.06450);
    without, mean is zero: root-mean-square normalisation (arXiv:1910.07467). addend: [N, D] or [N, H, D]. shares: what
    the expert op that gets `Fan.shares` hands back. Sums and statistics are formed in float32 at least; where there is
    a copy, the backward reads it instead of the stream, which is not kept. Raises `ValueError` for shapes that do not
    fit, and where a stream that was carried on gets no addend.
    """
    stream, placeholder = x if isinstance(x, Carried) else (x, None)
    _check(stream, weight, bias, addend)
    if placeholder is not None and addend is None:
        raise ValueError("addend is missing: a stream that was carried on ends in a sum")
    dtype = compute_dtype(stream)
    parts = addend.unsqueeze(1) if addend is not None and addend.dim() == 2 else addend
    announced = [] if shares is None else [shares.n_rows, shares.width, int(shares.listed)]
    total, normed, low, *_, rows, position, carried = torch.ops.moeut.norm_fan(
        stream, placeholder, parts, weight, bias, eps, center, dtype, announced, resolve(stream)
    )
    residual = Carried(stream.detach(), carried) if addend is None else total
    data = low if dtype != stream.dtype else stream if addend is None else total
    return Fan(normed, data, residual, None if shares is None else Shares(rows, position))


def _check(stream: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> None:
    if stream.dim() != 2 or not 0 < stream.shape[1] <= WIDEST:
        raise ValueError(f"x must be [N, D] with D up to {WIDEST}, got {tuple(stream.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != stream.shape[1:]:
            raise ValueError(f"{name} must be {tuple(stream.shape[1:])}, got {tuple(vector.shape)}")
    if addend is not None:
        fits = addend.dim() in (2, 3) and (addend.shape[0], addend.shape[-1]) == stream.shape
        if not fits or addend.shape[1] == 0:
            raise ValueError(
                f"addend must be [N, D] or [N, H, D] for x {tuple(stream.shape)}, got {tuple(addend.shape)}"
            )


def _placeholder(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype).expand(shape)  # nobody reads it: not worth a kernel that fills it


def _placeholders(
    residual: Tensor, addend: Tensor | None, dtype: torch.dtype, shares: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows, their position, and the stream carried on: each with memory of its own, of one number."""
    n_rows, width, listed = shares or (0, 0, 0)
    return (
        _placeholder(residual, (n_rows, width), dtype),
        _placeholder(residual, (n_rows if listed else 0,), torch.float32),
        _placeholder(residual, tuple(residual.shape) if addend is None else (0,), residual.dtype),
    )


def _forward(
    residual: Tensor, placeholder: Tensor | None, addend: Tensor | None, weight: Tensor, bias: Tensor | None,
    eps: float, center: bool, dtype: torch.dtype, shares: list[int], backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    if backend == "triton":
        from moeut_kernels import triton_norm

        made = triton_norm.fan(residual, addend, weight, bias, eps, center, dtype)
        return *made, *_placeholders(residual, addend, dtype, shares)
    wide = wide_float(residual.contiguous())
    wide = wide if addend is None else wide + addend.to(wide.dtype).sum(1)
    mean = wide.mean(1) if center else wide.new_empty(0)
    away = wide - mean[:, None] if center else wide
    scale = (away.square().mean(1) + eps).rsqrt()
    normed = away * scale[:, None] * wide_float(weight)
    normed = normed if bias is None else normed + wide_float(bias)
    total = residual.new_empty(0) if addend is None else wide.to(residual.dtype)
    low = residual.new_empty(0, dtype=dtype) if dtype == residual.dtype else wide.to(dtype)
    return (
        total,
        normed.to(dtype, copy=True),
        low,
        mean,
        scale,
        *_placeholders(residual, addend, dtype, shares),
    )


def _fake_forward(residual, placeholder, addend, weight, bias, eps, center, dtype, shares, backend):  # type: ignore[no-untyped-def]
    n_rows, wide = residual.shape[0], torch.float64 if residual.dtype == torch.float64 else torch.float32
    return (
        residual.new_empty(0 if addend is None else residual.shape),
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty(0 if dtype == residual.dtype else residual.shape, dtype=dtype),
        residual.new_empty(n_rows if center else 0, dtype=wide),
        residual.new_empty(n_rows, dtype=wide),
        *_placeholders(residual, addend, dtype, shares),
    )


def _backward(
    passing: Tensor | None, d_normed: Tensor | None, rows: Tensor | None, position: Tensor | None, source: Tensor,
    weight: Tensor, mean: Tensor, scale: Tensor, center: bool, dtype: torch.dtype, low_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of the stream, its copy in `low_dtype` (else empty), those of weight and bias [2, D] (or empty)."""
    n_tokens, width = source.shape
    terms = 0 if rows is None or not n_tokens else rows.shape[0] // n_tokens
    if backend == "triton":
        from moeut_kernels import triton_norm

        return triton_norm.fan_backward(
            passing, d_normed, rows, position, terms, source, weight, mean, scale, center, dtype, low_dtype
        )
    source = source.contiguous()
    total = scale.new_zeros(source.shape) if passing is None else wide_float(passing.contiguous())
    affine = scale.new_zeros(2, 0 if d_normed is None else width)
    if d_normed is not None:
        away = wide_float(source) - mean[:, None] if center else wide_float(source)
        unit, dy = away * scale[:, None], wide_float(d_normed)
        g = dy * wide_float(weight)
        inner = g - unit * (g * unit).mean(1, keepdim=True)
        total = total + scale[:, None] * (inner - g.mean(1, keepdim=True) if center else inner)
        affine = torch.stack(((dy * unit).sum(0), dy.sum(0)))
    if rows is not None:
        ordered = rows if position is None else rows.index_select(0, position)
        total = total + wide_float(ordered).view(n_tokens, terms, rows.shape[1])[..., :width].sum(1)
    low = source.new_empty(0) if low_dtype is None else total.to(low_dtype, copy=True)
    return total.to(dtype, copy=True), low, affine


def _fake_backward(
    passing, d_normed, rows, position, source, weight, mean, scale, center, dtype, low_dtype, backend
):  # type: ignore[no-untyped-def]
    return (
        source.new_empty(source.shape, dtype=dtype),
        source.new_empty(0) if low_dtype is None else source.new_empty(source.shape, dtype=low_dtype),
        scale.new_empty(2, 0 if d_normed is None else source.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    residual, placeholder, addend, weight, bias, _, ctx.center, dtype, _, ctx.backend = inputs
    total, _, low, mean, scale, *_ = output
    source = low if dtype != residual.dtype else residual if addend is None else total
    ctx.dtype, ctx.is_carried, ctx.has_bias = residual.dtype, placeholder is not None, bias is not None
    ctx.addend = None if addend is None else (addend.dtype, addend.shape[1])
    ctx.save_for_backward(source, weight, mean, scale)
    ctx.mark_non_differentiable(mean, scale)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, d_low: Tensor | None, _: None, __: None,
    rows: Tensor | None, position: Tensor | None, d_carried: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    source, weight, mean, scale = ctx.saved_tensors
    passing = d_total if ctx.addend is not None else d_carried
    if d_low is not None and rows is not None:
        passing = d_low.to(ctx.dtype) if passing is None else passing + d_low
    elif d_low is not None:
        rows, position = d_low, None  # one row a token, in order
    if passing is None and d_normed is None and rows is None:
        return (None,) * 10
    listed = position is not None and position.numel() > 0
    wants_low = ctx.addend is not None and ctx.addend[0] != ctx.dtype
    d_stream, low, affine = torch.ops.moeut.norm_fan_backward(
        passing, d_normed, rows, as_integers(position) if listed else None, source, weight, mean, scale, ctx.center,
        ctx.dtype, ctx.addend[0] if wants_low else None, ctx.backend,
    )  # fmt: skip
    d_addend = d_weight = d_bias = None
    if ctx.addend is not None:
        d_addend = (low if wants_low else d_stream).unsqueeze(1).expand(-1, ctx.addend[1], -1)
    if d_normed is not None:
        d_weight = affine[0].to(weight.dtype)
        d_bias = affine[1].to(weight.dtype) if ctx.has_bias else None
    d_residual, d_placeholder = (None, d_stream) if ctx.is_carried else (d_stream, None)
    return d_residual, d_placeholder, d_addend, d_weight, d_bias, *(None,) * 5


_op = torch.library.custom_op(
    "moeut::norm_fan",
    _forward,
    mutates_args=(),
    schema="(Tensor residual, Tensor? placeholder, Tensor? addend, Tensor weight, Tensor? bias, float eps, bool center,"
    " ScalarType dtype, SymInt[] shares, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "moeut::norm_fan_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? passing, Tensor? d_normed, Tensor? rows, Tensor? position, Tensor source, Tensor weight,"
    " Tensor mean, Tensor scale, bool center, ScalarType dtype, ScalarType? low_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)
_op.register_autograd(_differentiate, setup_context=_setup_context)
