"""Writing: prompts in, text out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moeut_compose.generate.decoding import Decoder, EagerDecoder
from moeut_compose.generate.sampling import Sampling
from moeut_compose.generate.text import Transcript
from moeut_compose.spec.recipe import PUBLISHED_SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moeut_compose.blocks.model import LanguageModel
    from moeut_compose.data.tokenizer import Tokenizer

Stop = str | tuple[str, ...] | list[str] | None


@dataclass(frozen=True)
class Writing:
    """What was written after one prompt."""

    prompt: str
    continuation: str
    """Without the prompt."""
    ids: tuple[int, ...]
    """Its tokens, with those of a stop text that was cut off."""
    seed: int
    end: Literal["stop", "length"]
    """Why it ended: a stop text came, or the number of tokens was reached."""

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation


class Generator:
    """Lets a model write, many prompts at a time.

    A sequence comes out the same whether it is written alone or beside others: of any length, with any seeds.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, decoder: Decoder | None = None) -> None:
        """`decoder` replaces the token-by-token one, see `moeut_compose.generate.graph.GraphDecoder`."""
        self._model = model
        self._tokenizer = tokenizer
        self._decoder = decoder or EagerDecoder(model)

    def write(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | int = 0,
        stop: Stop = PUBLISHED_SEPARATOR,
        stream: Callable[[int, str], None] = lambda index, text: None,
    ) -> list[Writing]:
        """Continue every prompt.

        A single seed stands for itself, itself + 1, … `stream` receives the text of prompt `index` piece by piece,
        the prompt first. Everything else is as in `generate`. Raises `ValueError`.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} is below 0")
        seeds = [seeds + index for index in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        if not prompts:
            return []
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        prompt_ids = [self._tokenizer.encode(prompt) for prompt in prompts]
        starts = [ids or self._tokenizer.encode(PUBLISHED_SEPARATOR) for ids in prompt_ids]
        transcripts = [
            Transcript(self._tokenizer, start, stops, is_whole=not ids)
            for start, ids in zip(starts, prompt_ids, strict=True)
        ]
        for index, prompt in enumerate(prompts):
            stream(index, prompt)
        with _evaluating(self._model):
            self._decoder.begin(
                starts, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(), seeds=seeds
            )
            n_written = 0
            while n_written < max_new_tokens and not all(one.has_stopped for one in transcripts):
                pieces = self._decoder.more()
                for index, (one, piece) in enumerate(zip(transcripts, pieces, strict=True)):
                    for identity in piece[: max_new_tokens - n_written]:
                        if not one.has_stopped and (text := one.add(identity)):
                            stream(index, text)
                n_written += len(pieces[0])
        for index, one in enumerate(transcripts):
            if text := one.finish():
                stream(index, text)
        return [
            Writing(prompt, one.text, tuple(one.ids), seed, "stop" if one.has_stopped else "length")
            for prompt, one, seed in zip(prompts, transcripts, seeds, strict=True)
        ]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Stop = PUBLISHED_SEPARATOR,
    stream: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue `prompt` and return prompt and continuation.

    The settings of the choice are those of `Sampling`. Generation ends after `max_new_tokens` or where the text
    reaches a `stop` text, which is cut off. A prompt without tokens stands for the beginning of a document. `stream`
    receives the text piece by piece.

    Raises `ValueError` for settings out of range.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    (writing,) = Generator(model, tokenizer).write(
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seed,
        stop=stop,
        stream=lambda _, text: stream(text),
    )
    return writing.text


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Without what only training does."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
