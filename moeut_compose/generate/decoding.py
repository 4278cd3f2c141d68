"""Decoding: from prompts to tokens, several sequences side by side.

Prompts of different lengths are padded on the right. A causal model never looks to its right, so that padding changes
nothing before it, and every sequence goes on at a position of its own: its next keys and values overwrite its padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from moeut_compose.blocks.cache import Cache
from moeut_compose.generate.sampling import Sampling, sample, seen_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.blocks.model import LanguageModel


class Decoder(Protocol):
    """Writes tokens after prompts."""

    def begin(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        """Read the prompts, none of them empty, and get ready to write; `seeds` are one for each."""

    def more(self) -> list[list[int]]:
        """The next tokens of every sequence, at least one, equally many for all."""


def padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]`, padded on the right, and lengths `[B]`. Raises `ValueError` for an empty prompt."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    return ids, torch.tensor([len(prompt) for prompt in prompts], device=device)


def read_prompts(model: LanguageModel, ids: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Cache]:
    """Logits `[B, V]` after prompts `[B, T]` of `lengths [B]`, and a cache with room for `capacity` positions."""
    out = model(ids, cache=Cache(), logits_at=lengths - 1)
    assert out.cache is not None and out.logits is not None
    return out.logits[:, 0], out.cache.with_room(lengths, capacity)


class EagerDecoder:
    """One forward pass of the model for each token, draws on the CPU: the definition of what is written.

    The model computes in its own dtype and on its own device, and must be in evaluation mode.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @torch.no_grad()
    def begin(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        device = next(self._model.parameters()).device
        ids, lengths = padded(prompts, device)
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._logits, self._cache = read_prompts(
            self._model, ids, lengths, ids.shape[1] + max(0, max_new_tokens - 1)
        )
        penal = sampling.repetition_penalty != 1
        self._seen = seen_tokens(prompts, self._logits.shape[-1]) if penal else None
        self._last: list[int] | None = None

    @torch.no_grad()
    def more(self) -> list[list[int]]:
        if self._last is not None:
            new = torch.tensor(self._last, device=self._logits.device)[:, None]
            out = self._model(new, cache=self._cache)
            self._logits, self._cache = out.logits[:, 0], out.cache
        self._last = sample(self._logits, self._sampling, self._generators, self._seen)
        if self._seen is not None:
            self._seen[torch.arange(len(self._last)), self._last] = True
        return [[token] for token in self._last]
