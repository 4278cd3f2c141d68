"""A jump of the loss is told, noise and a falling loss are not."""

import random

import pytest

from moeut_compose.train.spikes import LOOKS_BACK, spike


def rows(losses: list[float], norms: list[float | None] | None = None) -> list[dict]:
    norms = norms or [1.0] * len(losses)
    return [
        {"event": "train", "step": 10 * (i + 1), "cross_entropy": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def test_a_jump_names_its_steps_and_both_sides() -> None:
    told = spike(rows([3.0] * LOOKS_BACK + [4.5], [1.0] * LOOKS_BACK + [None]))
    assert told == (
        f"loss spike: 4.500 over steps {10 * LOOKS_BACK + 1} to {10 * LOOKS_BACK + 10}, against 3.000 before "
        "(gradient norm 1.00, now not finite)"
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_a_falling_loss_is_no_spike(seed: int) -> None:
    dice = random.Random(seed)
    losses = [3 + 5 * 0.95**i + dice.uniform(-0.05, 0.05) for i in range(100)]
    assert not any(spike(rows(losses[: i + 1])) for i in range(len(losses)))


def test_noisy_runs_need_larger_jumps() -> None:
    noisy = [3.0 + 0.2 * (-1) ** i for i in range(LOOKS_BACK)]
    assert spike(rows([*noisy, 4.0])) is None
    assert spike(rows([*noisy, 4.9])) is not None


def test_validation_rows_and_early_rows_say_nothing() -> None:
    assert spike(rows([3.0] * (LOOKS_BACK - 1) + [9.0])) is None
    mixed = rows([3.0] * LOOKS_BACK)
    assert spike([*mixed, {"event": "validation", "step": 121, "cross_entropy": 9.0}]) is None
