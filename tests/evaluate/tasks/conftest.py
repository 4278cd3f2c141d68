"""A tokenizer and a model small enough that every score can be worked out by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 96


class Pieces:
    """Words of at most two letters are one piece, longer ones several; the first piece of a word carries `▁`.

    "Shane" is `▁Sh an e`. Like SentencePiece, runs of white space count as one space and none is kept at the ends.
    """

    start_id: int | None = 1
    fingerprint = "pieces"

    def __init__(self) -> None:
        self.pieces = ["<unk>", "<s>"]

    def id(self, piece: str) -> int:
        if piece not in self.pieces:
            self.pieces.append(piece)
            assert len(self.pieces) <= VOCABULARY
        return self.pieces.index(piece)

    def encode(self, text: str) -> list[int]:
        words = text.split()
        chunks = [[word[i : i + 2] for i in range(0, len(word), 2)] for word in words]
        return [
            self.id(("▁" if place == 0 else "") + chunk)
            for word in chunks
            for place, chunk in enumerate(word)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")


@dataclass
class Output:
    logits: Tensor


class Bigrams(nn.Module):
    """Gives pieces the probabilities that are listed for the piece before; all others share what is left."""

    def __init__(self, pieces: Pieces, probabilities: dict[str, dict[str, float]]) -> None:
        super().__init__()
        table = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY)
        for piece, following in probabilities.items():
            rest = (1 - sum(following.values())) / (VOCABULARY - len(following))
            table[pieces.id(piece)] = rest
            for next_piece, probability in following.items():
                table[pieces.id(piece), pieces.id(next_piece)] = probability
        self.table = nn.Parameter(table.log())
        self.shapes: list[tuple[int, int]] = []

    def forward(self, ids: Tensor) -> Output:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.shapes.append((ids.shape[0], ids.shape[1]))
        return Output(self.table[ids])


@dataclass
class SmallRun:
    """As much of a run as the benchmarks need."""

    path: Path
    model: nn.Module
    tokenizer: Pieces
    step: int = 7
    context: int = 64


MakeRun = Callable[..., SmallRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run whose model knows these probabilities of one piece after another."""

    def make(probabilities: dict[str, dict[str, float]]) -> SmallRun:
        pieces = Pieces()
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return SmallRun(folder, Bigrams(pieces, probabilities), pieces)

    return make


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An empty folder for benchmark files."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def log() -> Callable[..., float]:
    """Sum of the logarithms of probabilities."""
    return lambda *probabilities: sum(map(math.log, probabilities))
