"""Runs of every small architecture, with fresh weights and one tokenizer, and a reference that never pads."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from moeut_compose.build import build_model
from moeut_compose.data.sources import builtin_corpus, open_source
from moeut_compose.data.tokenizer import train_tokenizer
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.recipe import JsonlData, RecipeSpec, TrainSentencePiece
from moeut_compose.train.run import Run
from tests.conftest import ROOT

FAMILIES = sorted(path.stem for path in (ROOT / "architectures").glob("*_tiny.yaml"))
CONTEXT = 48
VOCABULARY = 512

MakeRun = Callable[[str], Run]


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Words of the built-in corpus, in order."""
    train, _ = builtin_corpus("classics")
    text = next(iter(open_source(JsonlData(files=[str(train)])).documents("train")))
    return text.split()[:4000]


@pytest.fixture(scope="session")
def run_folder(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    settings = TrainSentencePiece(long_documents="split")
    train_tokenizer(settings, [" ".join(words)], vocab_size=VOCABULARY).save(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def make_run(run_folder: Path) -> MakeRun:
    """A run of an architecture that was never trained."""

    def make(name: str) -> Run:
        spec = load_spec(name, overrides=[f"vocab_size={VOCABULARY}", f"context_length={CONTEXT}"])
        model = build_model(spec, device="cpu", seed=1).eval()
        return Run(run_folder, spec, RecipeSpec(name="none", steps=1), model, step=0)

    return make


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]  # type: ignore[arg-type]


class Unpadded(TemplateLM):
    """The tokenisation and the windows of the harness itself, and a forward pass for each length."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @property
    def eot_token_id(self) -> int:
        start = self.run.tokenizer.start_id
        assert start is not None
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.run.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        by_length = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            ids = (context + continuation)[-(self.run.context + 1) :]
            by_length[len(ids)].append((index, ids, min(len(continuation), len(ids) - 1)))
        results = {}
        for group in by_length.values():
            rows = torch.tensor([ids for _, ids, _ in group])
            logits = self.run.model(rows[:, :-1]).logits.double()
            for (index, ids, n), of_row in zip(group, logits, strict=True):
                wanted = torch.tensor(ids[len(ids) - n :])
                places = of_row[len(of_row) - n :]
                chosen = places.log_softmax(-1).gather(-1, wanted[:, None])
                results[index] = (chosen.sum().item(), bool((places.argmax(-1) == wanted).all()))
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(*request.args), self.eot_token_id, self.run.context, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError
