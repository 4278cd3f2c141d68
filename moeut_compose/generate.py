"""Writing text: one token at a time, with the keys and values of earlier tokens kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeut_compose.blocks.cache import Cache
from moeut_compose.spec.recipe import PUBLISHED_SEPARATOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from moeut_compose.data.tokenizer import Tokenizer


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | None = PUBLISHED_SEPARATOR,
    stream: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue `prompt` and return prompt and continuation.

    `temperature` 0 takes the likeliest token. `top_k` and `top_p` leave only the likeliest tokens, by number
    and by joint probability. Generation ends after `max_new_tokens` or where the text reaches `stop`, which
    is cut off. An empty prompt stands for the beginning of a document. `stream` receives the text piece by
    piece.

    Raises `ValueError` for settings out of range.
    """
    _check(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    device = next(model.parameters()).device
    start = tokenizer.encode(prompt or PUBLISHED_SEPARATOR)
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    text = ""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            cache = Cache()
            new = start
            stream(prompt)
            for _ in range(max_new_tokens):
                out = model(torch.tensor([new], device=device), cache=cache)
                cache = out.cache
                chosen = sample(
                    out.logits[0, -1], generator, temperature=temperature, top_k=top_k, top_p=top_p
                )
                ids.append(chosen)
                new = [chosen]
                longer, ended = continuation(tokenizer, start, ids, stop, is_whole=not prompt)
                if len(longer) > len(text):
                    stream(longer[len(text) :])
                    text = longer
                if ended:
                    break
    finally:
        model.train(was_training)
    final, _ = continuation(tokenizer, start, ids, stop, is_whole=not prompt, hold_back=False)
    stream(final[len(text) :])
    return prompt + final


def continuation(
    tokenizer: Tokenizer,
    start: list[int],
    ids: list[int],
    stop: str | None,
    *,
    is_whole: bool,
    hold_back: bool = True,
) -> tuple[str, bool]:
    """The text of `ids` after the prompt's ids `start`, and whether it has reached `stop`.

    With `hold_back` a piece of text that may yet turn out to be the beginning of `stop` is not given out, nor
    is an incomplete character.
    """
    before = [] if is_whole else start
    text = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    if stop and (end := text.find(stop)) >= 0:
        return text[:end].rstrip(), True
    if hold_back:
        text = text.rstrip("\ufffd")
        sizes = range(min(len(stop or ""), len(text)), 0, -1)
        begun = next((size for size in sizes if stop and text.endswith(stop[:size])), 0)
        text = text[: len(text) - begun]
    return text, False


def sample(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draw one token from `logits [V]`, on the CPU in float32, so that a seed means the same everywhere."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        lowest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        surplus = ordered.cumsum(-1) - ordered >= top_p
        probabilities[order[surplus]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 0")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and at most at 1")
