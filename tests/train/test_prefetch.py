"""Batches come early, in order and once, and waiting for them is known."""

import threading
import time

import pytest
import torch

from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.prefetch import Prefetcher
from moeut_compose.train.run import train


def test_the_next_batches_are_read_while_this_one_is_used() -> None:
    read = threading.Semaphore(0)
    asked: list[int] = []

    def make(step: int) -> torch.Tensor:
        asked.append(step)
        read.release()
        return torch.tensor(step)

    batches = Prefetcher(make, steps=5, pin=False)
    try:
        assert batches(0).item() == 0
        for _ in range(3):
            assert read.acquire(timeout=10)
        assert asked == [0, 1, 2], "two ahead, no more"
        assert [batches(step).item() for step in range(1, 5)] == [1, 2, 3, 4]
        assert asked == [0, 1, 2, 3, 4], "each once, none after the last"
    finally:
        batches.close()


def test_any_step_can_be_asked_for() -> None:
    batches = Prefetcher(torch.tensor, steps=100, pin=False)
    try:
        assert [batches(step).item() for step in (3, 50, 50, 2, 99)] == [3, 50, 50, 2, 99]
    finally:
        batches.close()


def test_waiting_is_measured_once() -> None:
    def slow(step: int) -> torch.Tensor:
        time.sleep(0.05)
        return torch.tensor(step)

    batches = Prefetcher(slow, steps=3, pin=False)
    try:
        batches(0)
        assert batches.take_waited() >= 0.05
        assert batches.take_waited() == 0.0
    finally:
        batches.close()


def test_what_reading_raises_is_raised_by_asking() -> None:
    def broken(step: int) -> torch.Tensor:
        raise OSError(f"step {step} cannot be read")

    batches = Prefetcher(broken, steps=3, pin=False)
    try:
        with pytest.raises(OSError, match="step 1 cannot"):
            batches(1)
    finally:
        batches.close()


def test_rows_hold_the_share_of_waiting(spec: ModelSpec, recipe: RecipeSpec) -> None:
    threads = threading.active_count()
    rows = read_rows(train(spec, recipe, device="cpu").folder / "metrics.jsonl")
    shares = [row["data_wait"] for row in rows if row["event"] == "train"]
    assert shares
    assert all(0 <= share < 1 for share in shares)
    assert threading.active_count() == threads, "no thread outlives a run"
