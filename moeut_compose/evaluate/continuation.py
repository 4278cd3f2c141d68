"""What a model writes after a prompt until one of several texts comes, as lm-evaluation-harness asks for it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeut_compose.data.errors import DataError
from moeut_compose.generate import generate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moeut_compose.train.run import Run

DEFAULT_NEW_TOKENS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the same thing, the first that is given wins."""


class _Reached(Exception):
    """A stop text has come."""


@dataclass(frozen=True)
class Continuation:
    """How a continuation is to be written."""

    until: tuple[str, ...]
    """Texts that end it, none of which belongs to it."""
    max_new_tokens: int
    context_length: int
    """Prompt and continuation together take no more tokens; a prompt loses its beginning."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, context_length: int) -> Continuation:
        """From the `generation_kwargs` of a task; without `do_sample` it is greedy. Raises `DataError`."""
        until = settings.get("until") or ()
        lengths = [settings[name] for name in LENGTHS if settings.get(name) is not None]
        n_new = int(lengths[0]) if lengths else min(DEFAULT_NEW_TOKENS, context_length // 2)
        if n_new >= context_length:
            raise DataError(
                f"the task asks for up to {n_new} new tokens, and the run has windows of {context_length}; "
                "leave the task out or take a run with longer windows"
            )
        sampling: dict[str, Any] = {}
        if settings.get("do_sample"):
            sampling = {"top_k": settings.get("top_k") or None, "top_p": settings.get("top_p")}
            given = settings.get("temperature")
            sampling["temperature"] = 1.0 if given is None else float(given)
        return cls(
            until=(until,) if isinstance(until, str) else tuple(filter(None, until)),
            max_new_tokens=n_new,
            context_length=context_length,
            **sampling,
        )

    def write(self, run: Run, prompt: str, *, seed: int = 0) -> str:
        """The continuation alone. An empty prompt stands for the beginning of a document."""
        prompt = self._shortened(run, prompt)
        pieces: list[str] = []

        def stream(piece: str) -> None:
            pieces.append(piece)
            if self._end("".join(pieces[1:])) is not None:
                raise _Reached

        with suppress(_Reached):
            generate(
                run.model,
                run.tokenizer,
                prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=seed,
                stop=None,
                stream=stream,
            )
        text = "".join(pieces[1:])  # the first piece is the prompt
        return text[: self._end(text)]

    def _end(self, text: str) -> int | None:
        """Where the first stop text begins."""
        return min((place for stop in self.until if (place := text.find(stop)) >= 0), default=None)

    def _shortened(self, run: Run, prompt: str) -> str:
        ids = run.tokenizer.encode(prompt)
        room = self.context_length - self.max_new_tokens
        return prompt if len(ids) <= room else run.tokenizer.decode(ids[-room:])
