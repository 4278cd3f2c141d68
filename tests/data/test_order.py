"""The order of windows is a pure function of seed and step."""

from itertools import pairwise

import pytest

from moeut_compose.data.order import permuted, windows_of_step


def test_streams_are_the_published_order() -> None:
    batch, n_windows = 64, 64 * 100 + 17
    for step in (0, 1, 99):
        assert windows_of_step(step, batch, n_windows, 0, "streams") == [step + 100 * i for i in range(64)]
    assert windows_of_step(100, batch, n_windows, 0, "streams") == windows_of_step(
        0, batch, n_windows, 0, "streams"
    )


@pytest.mark.parametrize("n_windows", [1, 2, 3, 7, 64, 1000])
def test_every_epoch_sees_every_window_once(n_windows: int) -> None:
    batch = 5
    dealt = [
        w for step in range(3 * n_windows) for w in windows_of_step(step, batch, n_windows, 11, "shuffled")
    ]
    epochs = [dealt[i : i + n_windows] for i in range(0, len(dealt), n_windows)]
    assert all(sorted(epoch) == list(range(n_windows)) for epoch in epochs)
    if n_windows > 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "epochs differ"
        assert all(epoch != sorted(epoch) for epoch in epochs)


def test_the_batch_size_only_cuts_the_order_elsewhere() -> None:
    by_four = [w for step in range(12) for w in windows_of_step(step, 4, 30, 3, "shuffled")]
    by_six = [w for step in range(8) for w in windows_of_step(step, 6, 30, 3, "shuffled")]
    assert by_four == by_six


def test_seeds_give_different_orders() -> None:
    orders = {tuple(windows_of_step(0, 20, 1000, seed, "shuffled")) for seed in range(50)}
    assert len(orders) == 50


def test_a_permutation_moves_neighbours_apart() -> None:
    size = 10_000
    places = [permuted(i, size, key=5) for i in range(size)]
    assert sorted(places) == list(range(size))
    close = sum(abs(a - b) < size // 100 for a, b in pairwise(places))
    assert close < 0.04 * size, "about 2 % of random neighbours are that close"


def test_too_few_windows() -> None:
    with pytest.raises(
        ValueError, match=r"3 windows cannot fill 4 streams; use order: shuffled or batch\.size=3"
    ):
        windows_of_step(0, 4, 3, 0, "streams")
    with pytest.raises(ValueError, match="shorter than one context"):
        windows_of_step(0, 4, 0, 0, "shuffled")
