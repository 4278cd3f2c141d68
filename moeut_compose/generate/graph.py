"""Decoding that never waits for the host: static shapes, draws on the device, one graph replay a token.

Prompts are read by the model itself; then the memories get room and the shapes never change again. A step takes the
last tokens, runs the model, chooses, and writes down, all on the device; on CUDA it is recorded once and replayed.
Weights are cast once to 16 bits.

What is promised: greedy writing takes the likeliest token of the same arithmetic; draws depend on seed and position of
their sequence and repeat on one kind of device, but are not those of `EagerDecoder`. The order of sums depends on how
many sequences run side by side, so that in 16 bits near-ties may fall differently from batch to batch.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from moeut_kernels import decode
from moeut_kernels.sampling import Choice, choose_tokens
from torch import Tensor

from moeut_compose.blocks.cache import Cache
from moeut_compose.generate.decoding import padded, read_prompts
from moeut_compose.generate.fused import packed
from moeut_compose.generate.sampling import Sampling, seen_tokens
from moeut_compose.progress import Reporter, SilentReporter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.blocks.model import LanguageModel

AT_ONCE = 16
"""Tokens written between two looks of the host."""

CHECKED_STEPS = 4
"""Steps in which a recorded step must write what the step itself writes."""

ROOM_STEP = 256
"""Room grows in these steps, so that a recorded graph serves prompts of many lengths."""


class GraphDecoder:
    """A `Decoder` for GPUs; it also runs on a CPU, without a graph, to be tested there."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        dtype: torch.dtype | None = None,
        fused: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        """`dtype` of the weights: by default bfloat16 on a GPU that computes in it, else float16; float32 on a CPU.

        `fused=False` runs the modules themselves where kernels for a few tokens would do.
        """
        self._device = next(model.parameters()).device
        self.dtype = dtype or _default_dtype(self._device)
        self._reporter = reporter or SilentReporter()
        self._model = copy.deepcopy(model).eval().to(self.dtype)
        self._fused = packed(self._model, self.dtype) if fused else None
        self._key: tuple[object, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fits = True

    @property
    def is_fused(self) -> bool:
        """Whether the kernels for a few tokens run, not the modules themselves."""
        return self._fused is not None and self._fits

    @torch.no_grad()
    def begin(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        ids, lengths = padded(prompts, self._device)
        room = -(-(ids.shape[1] + max_new_tokens + AT_ONCE) // ROOM_STEP) * ROOM_STEP
        logits, cache = read_prompts(self._model, ids, lengths, room)
        key = (len(prompts), room, sampling)
        if key != self._key:
            self._allocate(cache, sampling, logits.shape[1])
        for kept, new in zip(self._memories, cache.memories, strict=True):
            for left, right in zip(kept, new, strict=True):
                left.copy_(right)
        self._seeds.copy_(torch.tensor([seed & 0x7FFFFFFF for seed in seeds]))
        self._written[:, : ids.shape[1]] = ids
        if self._seen is not None:
            self._seen.copy_(seen_tokens(prompts, logits.shape[1]))
        self._position.copy_(lengths - 1)
        self._lengths = lengths.tolist()
        self._n_given = 0
        self._choose(logits.float())
        self._n_written = 1
        if key != self._key:
            self._record()
            self._key = key

    @torch.no_grad()
    def more(self) -> list[list[int]]:
        n = 1 if self._n_given == 0 else AT_ONCE
        self.advance(self._n_given + n - self._n_written)
        written = self._written.tolist()
        begin, self._n_given = self._n_given, self._n_given + n
        return [
            row[length + begin : length + begin + n]
            for row, length in zip(written, self._lengths, strict=True)
        ]

    def advance(self, n: int) -> None:
        """Write `n` more tokens of every sequence without looking at them."""
        for _ in range(n):
            self._step() if self._graph is None else self._graph.replay()
        self._n_written += max(0, n)

    def _allocate(self, cache: Cache, sampling: Sampling, vocab_size: int) -> None:
        """Memory that stays where it is, for a batch of this size and room."""
        assert isinstance(cache.length, Tensor)
        self._key, self._graph = (), None
        self._memories = tuple(
            (torch.zeros_like(key), torch.zeros_like(value)) for key, value in cache.memories
        )
        batch, room = len(cache.length), cache.memories[0][0].shape[2]
        self._position, self._tokens, self._seeds = (torch.zeros_like(cache.length) for _ in range(3))
        self._written = self._tokens.new_zeros(batch, room + 1)
        self._choice = Choice(
            self._device,
            temperature=sampling.temperature,
            top_k=None if sampling.top_k is None else min(sampling.top_k, vocab_size),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            penalty=sampling.repetition_penalty,
        )
        penal = self._choice.penalty
        self._seen = torch.zeros(batch, vocab_size, dtype=torch.int8, device=self._device) if penal else None
        self._fits = batch <= decode.MOST_TOKENS
        if self._fused is not None:
            self._fused.make_room(room)

    def _step(self) -> None:
        if self._fused is not None and self._fits:
            logits = self._fused.step(self._tokens, self._position, self._memories)
        else:
            out = self._model(self._tokens[:, None], cache=Cache(self._position, self._memories))
            logits = out.logits[:, 0].float()
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        choose_tokens(
            logits,
            self._choice,
            position=self._position,
            tokens=self._tokens,
            written=self._written,
            seeds=self._seeds,
            seen=self._seen,
        )

    def _record(self) -> None:
        """Run the step for what is made on first use, then record it and compare; the state stays as it was."""
        if self._device.type != "cuda":
            return
        from moeut_kernels.triton_decode import one_by_one

        started = time.monotonic()
        self._reporter.note("preparing fast decoding: compiling kernels and recording a step")
        state = [self._position, self._tokens, self._written]
        state += [] if self._seen is None else [self._seen]
        kept = [part.clone() for part in state]

        def restore() -> list[Tensor]:
            """Put the state back; returns what it had become."""
            seen = [part.clone() for part in state]
            for part, before in zip(state, kept, strict=True):
                part.copy_(before)
            return seen

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), one_by_one():
            self._steps()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        wanted = restore()
        for prepare in (nullcontext, one_by_one):
            with prepare():
                self._graph = self._captured()
            self._steps()
            found = restore()
            if not self.is_fused or all(map(torch.equal, found, wanted)):
                break
            self._reporter.warn("the recorded step differs from the step; recording it without early starts")
        self._reporter.note(f"ready after {time.monotonic() - started:.0f} s")

    def _steps(self) -> None:
        """A few steps, to be compared."""
        for _ in range(CHECKED_STEPS):
            self._step() if self._graph is None else self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
