"""`expert_split` and `expert_merge` in Triton: by pairs of experts where every item has two, else by slots.

By slots: products per slot in expert order, summed by a gather with the gates. By pairs: `triton_pairs`, which never
writes a product per slot of the model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeut_kernels import triton_pairs
from moeut_kernels.plan import slots_per_row
from moeut_kernels.triton_gradients import weight_gradient
from moeut_kernels.triton_rows import grouped_rows
from moeut_kernels.triton_sums import gather_sum, row_dots, segment_sum
from moeut_kernels.triton_tiles import offers

Routing = Sequence[Tensor]


def _by_pairs(weight: Tensor, bias: Tensor | None, low_slots: Tensor, merge: bool) -> bool:
    """Pairs need their narrow side (split: columns out, merge: columns in) in one tile, and no bias."""
    is_narrow = weight.shape[1 if merge else 2] <= triton_pairs.WIDEST_NARROW
    return is_narrow and bias is None and low_slots.numel() > 0 and offers("pair_wide", weight)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def forward(
    merge: bool,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    save: bool,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and what the gate gradient of a split needs (empty unless saved). Body of both forwards."""
    x, weight, gate, bias = _contiguous(x, weight, gate, bias)
    index, slots, position, _, tiles, low_slots, pair_tiles = _contiguous(*routing)
    n_tokens, n_groups, _ = index.shape
    rows, keep = x.reshape(-1, x.shape[-1]), save and not merge
    if _by_pairs(weight, bias, low_slots, merge):
        pairs = (gate, low_slots, position, pair_tiles)
        if merge:
            parts, _, _ = triton_pairs.wide(rows, weight, *pairs)
            if summed:
                return gather_sum(parts, None, n_tokens, n_groups), x.new_empty(0)
            return parts.view(n_tokens, n_groups, -1), x.new_empty(0)
        out, kept, _, _ = triton_pairs.narrow(rows, weight, *pairs, per_row=n_groups, keep=keep)
        return out.view(n_tokens, n_groups, -1), kept
    per_input, per_output = slots_per_row(merge, index, apart=not summed)
    products, _ = grouped_rows(rows, weight, slots, tiles, per_row=per_input, bias=bias)
    out = gather_sum(products, position, products.shape[0] // per_output, per_output, gate)
    out = out if merge and summed else out.view(n_tokens, n_groups, weight.shape[2])
    return out, products if keep else x.new_empty(0)


def backward(
    merge: bool,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    master: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    kept: Tensor,
    wants: Sequence[bool],
    hand_in: bool,
    sum_x: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, gate, bias; and gate times the narrow rows in expert order, which a deferred gradient
    needs. Empty where not wanted; that of a split's x by group unless sum_x. Body of both backwards.

    master: the weight, whose shape and dtype its gradient has; `weight` may be padded.
    """
    grad, x, weight, gate, bias = _contiguous(grad, x, weight, gate, bias)
    routing = _contiguous(*routing)
    operands = (grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), weight, master, gate)
    if _by_pairs(weight, bias, routing[5], merge):
        body = _merge_by_pairs if merge else _split_by_pairs
        d_x, d_weight, d_gate, ordered = body(*operands, routing, kept, wants[1], sum_x)
        d_bias = None
    else:
        d_x, d_weight, d_gate, d_bias = _by_slots(merge, *operands, bias, routing, kept, wants, sum_x)
        ordered = _ordered_rows(operands[1] if merge else operands[0], gate, routing) if hand_in else None
    if wants[0] and sum_x:
        d_x = d_x.view(x.shape)
    if wants[2]:
        d_gate = d_gate.view(gate.shape).to(gate.dtype)
    grads = zip((d_x, d_weight, d_gate, d_bias, ordered), (*wants, hand_in), strict=True)
    return tuple(g if wanted else grad.new_empty(0) for g, wanted in grads)


def _split_by_pairs(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    master: Tensor,
    gate: Tensor | None,
    routing: Routing,
    kept: Tensor,
    want_weight: bool,
    sum_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, slots, position, offsets, _, low_slots, pair_tiles = routing
    n_groups = index.shape[1]
    partial, dots, ordered = triton_pairs.wide(
        grad,
        weight,
        gate,
        low_slots,
        position,
        pair_tiles,
        transposed=True,
        products=kept,
    )
    d_weight = torch.empty(master.shape if want_weight else 0, dtype=master.dtype, device=x.device)
    weight_gradient([x], [ordered], [slots], [offsets], per_left=2 * n_groups, per_right=None, out=d_weight)
    d_x = gather_sum(partial, None, x.shape[0], n_groups) if sum_x else partial
    return d_x, d_weight, dots, ordered


def _merge_by_pairs(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    master: Tensor,
    gate: Tensor | None,
    routing: Routing,
    kept: Tensor,
    want_weight: bool,
    sum_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, slots, position, offsets, _, low_slots, pair_tiles = routing
    n_groups = index.shape[1]
    pairs = (gate, low_slots, position, pair_tiles)
    d_x, _, dots, ordered = triton_pairs.narrow(
        grad, weight, *pairs, per_row=n_groups, transposed=True, other=x
    )
    d_weight = torch.empty(master.shape if want_weight else 0, dtype=master.dtype, device=x.device)
    weight_gradient(
        [ordered], [grad], [slots], [offsets], per_left=None, per_right=2 * n_groups, out=d_weight
    )
    return d_x, d_weight, dots, ordered


def _ordered_rows(rows: Tensor, gate: Tensor | None, routing: Routing) -> Tensor:
    """gate · rows in expert order; every (token, group) row once for each of its choices."""
    index, slots = routing[:2]
    ordered = rows.index_select(0, slots // index.shape[2])
    return ordered if gate is None else ordered.mul_(gate.reshape(-1).index_select(0, slots).unsqueeze(1))


def _by_slots(
    merge: bool,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    master: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    kept: Tensor,
    wants: Sequence[bool],
    sum_x: bool,
) -> tuple[Tensor | None, ...]:
    index, slots, position, offsets, tiles, *_ = routing
    per_input, per_output = slots_per_row(merge, index)
    want_x, want_weight, want_gate, want_bias = wants
    d_x = d_weight = d_gate = d_bias = None
    if want_x or (want_gate and merge):
        back, _ = grouped_rows(grad, weight, slots, tiles, per_row=per_output, transposed=True)
    if want_x:
        terms, _ = slots_per_row(merge, index, apart=not sum_x)
        d_x = gather_sum(back, position, back.shape[0] // terms, terms, gate)
    if want_weight:
        d_weight = torch.empty(master.shape, dtype=master.dtype, device=x.device)
        weight_gradient(
            [x], [grad], [slots], [offsets], per_left=per_input, per_right=per_output, gate=gate, out=d_weight
        )
    if want_gate:
        slot = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
        if merge:
            d_gate = row_dots(x, back, slot // per_input, position)
            if bias is not None:
                d_gate = row_dots(bias, grad, index.view(-1), slot // per_output, d_gate)
        else:
            d_gate = row_dots(kept, grad, position, slot // per_output)
    if want_bias:
        d_bias = segment_sum(grad, slots, offsets, per_row=per_output, dtype=bias.dtype, gate=gate)
    return d_x, d_weight, d_gate, d_bias
