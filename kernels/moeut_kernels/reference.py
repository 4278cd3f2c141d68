"""The grouped products in plain PyTorch: the definition of every op, and the fast path on CPU.

Rows are gathered into expert order, multiplied one contiguous segment per expert, and summed per output row by a
gather. `grouped_mm` hands all segments to PyTorch's grouped matmul where it takes the dtype and the strides.
Legend: S slots in expert order, E experts, D columns in, F columns out, offsets [E + 1] first row of each expert.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm

from moeut_kernels.casting import wide_float


def _grouped_mm_takes(*operands: Tensor) -> bool:
    """PyTorch's grouped matmul wants 16-byte rows and 16-byte aligned data. On CPU its float16 path is very slow."""
    first = operands[0]
    dtypes = (torch.bfloat16,) if first.device.type == "cuda" else (torch.bfloat16, torch.float32)
    if first.dtype not in dtypes or any(t.numel() == 0 for t in operands):
        return False
    pitches = (max(t.stride(-1), t.stride(-2)) * t.element_size() for t in operands)
    return all(pitch % 16 == 0 for pitch in pitches) and all(t.data_ptr() % 16 == 0 for t in operands)


def _counts(offsets: Tensor) -> list[int]:
    return offsets.diff().tolist()


def grouped_rows(rows: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Each row times the matrix of its expert: rows [S, D], weight [E, D, F] -> [S, F]."""
    if rows.dtype == torch.float16 and rows.device.type == "cpu":
        return grouped_rows(rows.float(), weight.float(), offsets, backend).half()
    if (
        backend == "grouped_mm"
        and _grouped_mm_takes(rows, weight)
        and weight.shape[2] * weight.element_size() % 16 == 0
    ):
        return grouped_mm(rows, weight, offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    counts = _counts(offsets)
    for segment, matrix, product in zip(rows.split(counts), weight.unbind(0), out.split(counts), strict=True):
        if segment.shape[0]:
            torch.mm(segment, matrix, out=product)
    return out


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Sum of outer products over each expert's rows: left [S, D], right [S, F] -> [E, D, F]. Empty experts: zero."""
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return grouped_outer(left.float(), right.float(), offsets, backend).half()
    if backend == "grouped_mm" and _grouped_mm_takes(left, right):
        return grouped_mm(left.t(), right, offs=offsets[1:])
    out = left.new_zeros(offsets.shape[0] - 1, left.shape[1], right.shape[1])
    counts = _counts(offsets)
    for a, b, product in zip(left.split(counts), right.split(counts), out.unbind(0), strict=True):
        if a.shape[0]:
            torch.mm(a.t(), b, out=product)
    return out


def gather_sum(rows: Tensor, position: Tensor, gate: Tensor | None = None) -> Tensor:
    """out[o] = sum_j gate[o, j] · rows[position[o, j]]: rows [R, D], position and gate [O, J] -> [O, D].

    Sums in float32 or wider.
    """
    if position.numel() == 0 or rows.shape[1] == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    if rows.dtype in (torch.float32, torch.float64):
        weights = None if gate is None else gate.to(rows.dtype)
        return embedding_bag(position, rows, mode="sum", per_sample_weights=weights)
    chosen = rows.index_select(0, position.reshape(-1)).view(*position.shape, -1).float()
    if gate is not None:
        chosen = chosen * gate.float().unsqueeze(-1)
    return chosen.sum(1).to(rows.dtype)


def segment_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows of each expert: rows [S, F] -> [E, F], in at least float32."""
    rows = wide_float(rows)
    if rows.numel() == 0:
        return rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    return torch.segment_reduce(rows, "sum", lengths=offsets.diff().long(), axis=0)


def gate_matrix(gate: Tensor, index: Tensor, n_experts: int) -> Tensor:
    """Gates as a dense [O, E] matrix, for the bias terms: gate and index [O, J]. A repeated expert adds up."""
    dense = gate.new_zeros(index.shape[0], n_experts)
    return dense.scatter_add_(1, index.long(), gate)
