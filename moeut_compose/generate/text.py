"""From ids to text while both still grow: what can be shown, and where a stop text ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.data.tokenizer import Tokenizer


class Transcript:
    """The text after one prompt."""

    def __init__(
        self, tokenizer: Tokenizer, start: list[int], stop: Sequence[str], *, is_whole: bool
    ) -> None:
        """`start` are the ids of the prompt; with `is_whole` the text begins a document instead."""
        self._tokenizer = tokenizer
        self._before = [] if is_whole else start
        self._skip = len(tokenizer.decode(self._before))
        self._stop = tuple(text for text in stop if text)
        self.ids: list[int] = []
        self.text = ""
        """What has been given out."""
        self.has_stopped = False

    def add(self, identity: int) -> str:
        """One more id; returns the text that may now be shown."""
        self.ids.append(identity)
        text = self._decode()
        ends = [end for stop in self._stop if (end := text.find(stop)) >= 0]
        if ends:
            self.has_stopped = True
            return self._give_out(text[: min(ends)].rstrip())
        return self._give_out(self._certain(text))

    def finish(self) -> str:
        """The text that was held back, once nothing more will come."""
        return "" if self.has_stopped else self._give_out(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._before + self.ids)[self._skip :]

    def _certain(self, text: str) -> str:
        """`text` without an incomplete character, and without what a stop text may yet take: its beginning, blanks."""
        text = text.rstrip("\ufffd")
        begun = 0
        for stop in self._stop:
            sizes = range(min(len(stop), len(text)), 0, -1)
            begun = max(begun, next((size for size in sizes if text.endswith(stop[:size])), 0))
        certain = text[: len(text) - begun]
        return certain.rstrip() if self._stop else certain

    def _give_out(self, text: str) -> str:
        if len(text) <= len(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece
