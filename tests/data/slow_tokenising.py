"""A process that tokenises slowly, so that it can be struck in the middle.

Arguments: shard, model, target folder, workers. Says `worker PID` for each it has started and `at N` after each chunk.
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

from moeut_compose.data import encoding, tokenising
from moeut_compose.data.sources import JsonlSource
from moeut_compose.data.tokenizer import Tokenizer
from moeut_compose.data.tokens import write_tokens


class Slow:
    """A reporter that takes its time."""

    def __init__(self) -> None:
        self._at = 0

    def note(self, text: str) -> None:
        print(text, flush=True)

    warn = note

    @contextmanager
    def task(self, title, *, total, done=0):
        yield self

    def advance(self, n=1, *, detail="") -> None:
        time.sleep(0.01)
        self._at += 1
        print("at", self._at, flush=True)


def tell(init):
    def started(self) -> None:
        init(self)
        print("worker", self.pid, flush=True)

    return started


if __name__ == "__main__":
    shard, model, folder, workers = sys.argv[1:]
    tokenising._CHUNK_CHARACTERS, tokenising._JOURNAL_BYTES = 1000, 3000
    encoding.Worker.__init__ = tell(encoding.Worker.__init__)
    source = JsonlSource([Path(shard)] * 2, [], field="text", fraction=0.0)
    write_tokens(
        Path(folder),
        source.shards("train"),
        Tokenizer.load(Path(model)),
        separator="|",
        workers=int(workers),
        reporter=Slow(),
    )
