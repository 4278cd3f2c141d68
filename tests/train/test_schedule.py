"""The learning rate is the published one, to the last digit that was published."""

from pathlib import Path

import pytest
from safetensors import safe_open

from moeut_compose.spec.recipe import ConstantSchedule, CosineSchedule
from moeut_compose.train.schedule import lr_at

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "training_trajectory.safetensors"


def test_golden_trajectory() -> None:
    with safe_open(str(GOLDEN), "pt") as archive:
        expected = archive.get_tensor("lr").tolist()
    schedule = CosineSchedule(warmup_steps=3, min_lr_multiplier=0.1)
    assert [lr_at(step, schedule, 0.0025, steps=12) for step in range(12)] == pytest.approx(
        expected, rel=1e-14
    )


def test_published_values() -> None:
    schedule = CosineSchedule(period=100_000)
    assert lr_at(0, schedule, 2.5e-4) == pytest.approx(6.25e-8)
    assert lr_at(3999, schedule, 2.5e-4) == lr_at(4000, schedule, 2.5e-4) == 2.5e-4
    assert lr_at(99_999, schedule, 2.5e-4) == pytest.approx(2.5888e-5, rel=1e-4)
    without = CosineSchedule(warmup_steps=0)
    assert lr_at(99_999, without, 2.5e-4, steps=100_000) == pytest.approx(2.5e-5, rel=1e-6)


def test_the_floor_holds_after_the_period() -> None:
    assert lr_at(500, CosineSchedule(warmup_steps=10, period=100), 1.0) == pytest.approx(0.1)


def test_constant() -> None:
    rates = [lr_at(step, ConstantSchedule(warmup_steps=4), 1.0) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_cosine_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="period"):
        lr_at(5000, CosineSchedule(), 1.0)
