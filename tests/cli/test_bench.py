"""`bench step` measures what it is told to; how long it takes is nobody's test."""

from collections.abc import Callable
from typing import Any

from typer.testing import Result


def test_two_models_are_measured_alike(cli_json: Callable[..., Any]) -> None:
    sizes = ["--batch", "2", "--seq-len", "16", "--micro-batch", "1", "--steps", "1", "--device", "cpu"]
    timings = cli_json("bench", "step", "dense_tiny", "moeut_tiny", *sizes)
    assert [timing["name"] for timing in timings] == ["dense_tiny", "moeut_tiny"]
    for timing in timings:
        assert (timing["batch"], timing["seq_len"], timing["micro_batch"]) == (2, 16, 1)
        assert timing["ms_low"] <= timing["ms"] <= timing["ms_high"]
        assert timing["precision"] == "fp32"
        assert not timing["compiled"]
        assert not timing["graphed"]
        assert timing["peak_gib"] is None
        assert timing["loss"] > 0


def test_a_graph_needs_a_gpu(cli: Callable[..., Result]) -> None:
    result = cli("bench", "step", "dense_tiny", "--cuda-graph", "--device", "cpu")
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.stderr
