"""Perplexity: the mean over all targets, whatever the batch size, outside autocast."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from moeut_compose.data.tokens import TokenFile, TokenIndex
from moeut_compose.evaluate.perplexity import measure_perplexity


@dataclass
class Output:
    cross_entropy: torch.Tensor


class Bigram(nn.Module):
    """Predicts from the last token alone, so the answer is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))
        self.dtypes: set[torch.dtype] = set()

    def forward(self, ids: torch.Tensor, *, targets: torch.Tensor) -> Output:
        assert not self.training
        logits = nn.functional.one_hot(ids, 7).float() @ self.table
        self.dtypes.add(logits.dtype)
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.fixture
def text() -> TokenFile:
    ids = np.random.default_rng(0).integers(0, 7, 104).astype(np.uint16)
    return TokenFile(ids, TokenIndex(n_tokens=104, n_documents=1, n_bytes=312, dtype="<u2"))


def expected(model: Bigram, text: TokenFile, n_targets: int) -> float:
    table = model.table.detach().double().log_softmax(-1)
    ids = torch.from_numpy(text.ids.astype(np.int64))
    return -table[ids[:n_targets], ids[1 : n_targets + 1]].mean().item()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_target_counts_once(text: TokenFile, batch_size: int) -> None:
    model = Bigram()
    result = measure_perplexity(model, text, context=10, batch_size=batch_size)
    assert (result.windows, result.tokens) == (10, 100)
    assert result.cross_entropy == pytest.approx(expected(model, text, 100), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.cross_entropy))
    assert result.bits_per_byte == pytest.approx(result.cross_entropy / math.log(2) / 3), "3 bytes a token"


def test_the_first_windows_only(text: TokenFile) -> None:
    model = Bigram()
    result = measure_perplexity(model, text, context=10, windows=4, batch_size=3)
    assert (result.windows, result.tokens) == (4, 40)
    assert result.cross_entropy == pytest.approx(expected(model, text, 40), rel=1e-6)


def test_float32_inside_autocast_and_the_mode_is_put_back(text: TokenFile) -> None:
    model = Bigram().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure_perplexity(model, text, context=10)
    assert model.dtypes == {torch.float32}
    assert model.training


def test_too_short_a_text(text: TokenFile) -> None:
    with pytest.raises(ValueError, match="less than one window of 500"):
        measure_perplexity(Bigram(), text, context=500)
