"""Log-probabilities of passages: the same alone, in a batch, padded or in another order."""

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.evaluate.scoring import Passage, batches_by_length, score_passages
from moeut_compose.spec.io import load_spec

PASSAGES = [
    Passage((5, 9, 2, 7), 2),
    Passage((3, 3), 1),
    Passage((8,), 0),
    Passage((), 0),
    Passage((1, 0, 0, 4, 6, 2, 9), 6),
    Passage((5, 9, 2, 7), 2),
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    changes = ["d_model=32", "vocab_size=40", "stages.0.layers.0.feedforward.n_experts=8"]
    return build_model(load_spec("moeut_tiny", changes), seed=1)


@pytest.mark.parametrize("max_tokens", [1, 12, 10_000])
def test_equal_to_one_forward_pass_each(model: torch.nn.Module, max_tokens: int) -> None:
    model.eval()
    for passage, score in zip(PASSAGES, score_passages(model, PASSAGES, max_tokens=max_tokens), strict=True):
        if not passage.n_scored:
            assert (score.log_probabilities, score.predictions) == ((), ())
            continue
        with torch.no_grad():
            logits = model(torch.tensor([passage.ids])).logits[0]
        places = range(len(passage.ids) - passage.n_scored, len(passage.ids))
        expected = [logits[place - 1].log_softmax(-1)[passage.ids[place]].item() for place in places]
        assert score.log_probabilities == pytest.approx(expected, abs=1e-5)
        assert score.predictions == tuple(logits[place - 1].argmax().item() for place in places)
        assert score.log_likelihood == pytest.approx(sum(expected), abs=1e-5)
        assert score.normalized == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_equal_passages_are_computed_once_and_reported_twice(model: torch.nn.Module) -> None:
    settled: list[int] = []
    scores = score_passages(model, PASSAGES, max_tokens=1, between=settled.append)
    assert scores[0] is scores[5]
    assert sorted(settled) == [1, 1, 1, 1, 2]


def test_the_mode_is_put_back_and_autocast_kept_out(model: torch.nn.Module) -> None:
    plain = score_passages(model, PASSAGES)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert score_passages(model, PASSAGES) == plain
    assert model.training


def test_batches_hold_passages_of_like_length_and_no_more_tokens_than_allowed() -> None:
    passages = [Passage(tuple(range(length)), 0) for length in (3, 1, 8, 5, 4, 20)]
    lengths = [[len(passage.ids) for passage in batch] for batch in batches_by_length(passages, 13)]
    assert lengths == [[20], [8], [5, 4], [3, 1]]


@pytest.mark.parametrize(("ids", "n_scored"), [((1, 2), 2), ((), 1), ((1, 2, 3), -1)])
def test_the_first_token_cannot_be_scored(ids: tuple[int, ...], n_scored: int) -> None:
    with pytest.raises(ValueError, match=f"n_scored={n_scored} does not fit {len(ids)} tokens"):
        Passage(ids, n_scored)
