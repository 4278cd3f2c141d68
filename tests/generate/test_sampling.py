"""What is left to draw from, worked out by hand, and the draw."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeut_compose.generate.sampling import NotFinite, Sampling, filtered, sample, seen_tokens

SHARES = torch.tensor([[0.05, 0.52, 0.03, 0.28, 0.12]])


def left(**settings) -> set[int]:
    kept = filtered(SHARES.log() + 2, Sampling(**({"temperature": 1.0} | settings)))
    return set(torch.isfinite(kept[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"temperature": 0}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.52}, {1}),
        ({"top_p": 0.53}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.2}, {1, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),  # 0.52 / 0.92 alone is not enough
        ({"temperature": 0.25, "min_p": 0.05}, {1, 3}),  # the shares to the fourth power
    ],
)
def test_filters(settings: dict, kept: set[int]) -> None:
    assert left(**settings) == kept


def test_the_penalty_lowers_what_was_seen() -> None:
    logits = torch.tensor([[2.0, -1.0, 2.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    kept = filtered(logits, Sampling(temperature=1.0, repetition_penalty=2.0), seen)
    assert kept.tolist() == [[1.0, -2.0, 2.0, -1.0]]
    assert seen_tokens([[2, 0], [1]], 3).tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-38}, {"temperature": 1e-45}, {"top_p": 1e-50}, {"repetition_penalty": 1e-40}],
)
def test_extreme_settings_leave_something_to_draw(settings: dict) -> None:
    seen = torch.tensor([[True, False, True, False, True]])
    drawn = sample(SHARES.log() * 90, Sampling(**settings), [torch.Generator()], seen)
    assert 0 <= drawn[0] < 5


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.integers(0, 2**31), st.floats(0.1, 3))
def test_a_draw_is_one_of_what_is_left(logits: list[float], seed: int, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=3, top_p=0.8, min_p=0.05)
    rows = torch.tensor([logits, logits])

    def draw() -> list[int]:
        return sample(rows, sampling, [torch.Generator().manual_seed(seed) for _ in range(2)])

    first, second = draw()
    assert first == second == draw()[0]
    assert torch.isfinite(filtered(rows, sampling)[0, first])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"min_p": -0.1}, r"min_p=-0\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
    ],
)
def test_settings_out_of_range(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_logits_that_are_no_numbers(temperature: float, value: float) -> None:
    logits = torch.cat((SHARES, torch.full_like(SHARES, value)))
    with pytest.raises(NotFinite, match="no next token"):
        sample(logits, Sampling(temperature=temperature), [torch.Generator(), torch.Generator()])
