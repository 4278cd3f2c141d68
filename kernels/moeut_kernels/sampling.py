"""Choosing the next token of every sequence without asking the host, so that a CUDA graph can hold it.

What is promised: greedy choices are those of the largest logit, the lowest index among equals. A draw depends on the
logits of its row, on the seed of its row and on its position, not on the other rows, and repeats bit for bit on one
kind of device; another implementation, the CPU's included, draws other tokens from the same distribution.
"""

import torch
from torch import Tensor

from moeut_kernels.decode import _on_triton


class Choice:
    """Settings of the choice as a tensor that a recorded graph reads: they may change, what is in use may not."""

    def __init__(
        self,
        device: torch.device,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        penalty: float = 1.0,
    ) -> None:
        """As in every sampler: penalty of tokens seen, temperature (0: greedy), top-k, top-p, min-p, in this order."""
        self.greedy = temperature == 0
        self.penalty = penalty != 1
        self.top_k, self.top_p, self.min_p = top_k is not None, top_p is not None and top_p < 1, bool(min_p)
        values = [penalty, temperature or 1.0, float(top_k or 0), top_p or 1.0, min_p or 0.0]
        self.settings = torch.tensor(values, dtype=torch.float32, device=device)

    @property
    def uses(self) -> tuple[bool, bool, bool, bool, bool]:
        return self.greedy, self.penalty, self.top_k, self.top_p, self.min_p


def choose_tokens(
    logits: Tensor,
    choice: Choice,
    *,
    position: Tensor,
    tokens: Tensor,
    written: Tensor,
    seeds: Tensor,
    seen: Tensor | None = None,
) -> None:
    """Choose a token for each row of `logits [N, V]`, float32, and write it down in place.

    position: [N] where the last token stands, moved on by one. tokens: [N] receives the choice, and so does
    written [N, room] at the new position. seeds: [N] integers. seen: [N, V] int8, the tokens that a penalty applies to;
    the choice is added.
    """
    if _on_triton(logits) and _fits(logits):
        from moeut_kernels import triton_sampling

        triton_sampling.choose(logits, seen, position, tokens, written, seeds, choice.settings, choice.uses)
        return
    left = _left(logits.float(), choice, seen)
    if not choice.greedy:
        left = left - torch.log(-torch.log(_noise(left, seeds, position).clamp(1e-10, 1 - 1e-7)))
    chosen = left.argmax(-1)
    position += 1
    tokens.copy_(chosen)
    written.scatter_(1, position.long()[:, None], chosen[:, None])
    if seen is not None:
        seen.scatter_(1, chosen[:, None], 1)


def _fits(logits: Tensor) -> bool:
    from moeut_kernels.triton_sampling import MOST_COLUMNS

    return logits.shape[1] <= MOST_COLUMNS


def _left(logits: Tensor, choice: Choice, seen: Tensor | None) -> Tensor:
    """The logits that remain to choose from."""
    penalty, temperature, top_k, top_p, min_p = choice.settings.unbind()
    if choice.penalty and seen is not None:
        logits = torch.where(seen != 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if choice.greedy:
        return logits
    logits = logits / temperature
    ordered = logits.sort(descending=True).values
    if choice.top_k:
        last = (top_k.long() - 1).clamp(0, logits.shape[-1] - 1)
        logits = logits.masked_fill(logits < ordered.index_select(-1, last[None]), float("-inf"))
    if choice.top_p:
        ordered = logits.sort(descending=True).values
        probability = ordered.softmax(-1)
        kept = probability.cumsum(-1) - probability < top_p
        lowest = torch.where(kept, ordered, float("inf")).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if choice.min_p:
        raised = (logits - logits.amax(-1, keepdim=True)).exp()
        logits = logits.masked_fill(raised < min_p, float("-inf"))
    return logits


def _noise(logits: Tensor, seeds: Tensor, position: Tensor) -> Tensor:
    """Uniform numbers `[N, V]` of seed and position: two rounds of a multiply-xor mixer over 32-bit words."""
    column = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int64)
    word = (column + (position.long()[:, None] + 1) * logits.shape[1]) ^ (seeds.long()[:, None] * 0x9E3779B1)
    word = word & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B & 0x7FFFFFFF):
        word = ((word ^ (word >> 16)) * factor) & 0xFFFFFFFF
        word = word ^ (word >> 15)
    return word.float() / 2.0**32
