"""`memory` and the memory lines of a dry run."""

from pathlib import Path

import pytest

from .conftest import RECIPE


def test_the_parts_and_the_peak(cli, cli_json) -> None:
    dense, moeut = cli_json("memory", "dense_tiny", "moeut_tiny", "--batch", "4", "--seq-len", "64")
    for row in (dense, moeut):
        assert row["gradients"] == row["weights"] == row["optimizer"] // 2
        assert (
            row["weights"] + row["optimizer"]
            < row["peak"]
            < sum(row[part] for part in ("weights", "gradients", "optimizer", "activations"))
        )
        assert row["activations_checkpointed"] < row["activations_selective"] < row["activations"]
        assert row["peak_checkpointed"] < row["peak_selective"] < row["peak"]
    assert moeut["weights"] == 4 * 2_460_928
    assert moeut["kv_cache"]["bytes_per_token"]["bf16"] == 3072
    lines = cli("memory", "dense_tiny", "moeut_tiny", "--seq-len", "64").stdout.splitlines()
    assert lines[0].split("  ")[0] == "GiB of a training step (bf16, batch 32)"
    assert lines[-1].split()[-2:] == ["3,072", "3,072"]


def test_forms(cli) -> None:
    sizes = ["memory", "moeut_tiny", "--seq-len", "32"]
    assert cli(*sizes, "--markdown").stdout.splitlines()[1] == "| --- | ---: |"
    header, row = cli(*sizes, "--csv").stdout.splitlines()
    assert (
        dict(zip(header.split(","), row.split(","), strict=True))["kv_cache_bytes_per_token_fp32"] == "6144"
    )
    assert cli(*sizes, "--csv", "--json").exit_code == 2


@pytest.mark.parametrize("option", ["--compile", "--precision=fp32", "--device=cpu"])
def test_what_a_step_runs_on_matters(cli_json, option: str) -> None:
    sizes = ["memory", "moeut_tiny", "--seq-len", "32"]
    assert cli_json(*sizes, option)[0]["activations"] != cli_json(*sizes)[0]["activations"]


def test_a_dry_run_shows_the_parts(cli) -> None:
    Path("short.yaml").write_text(RECIPE)
    shown = cli("train", "moeut_tiny", "--recipe", "short.yaml", "--dry-run", "--device", "cpu").stdout
    for word in (
        "weights ",
        "gradients ",
        "optimiser ",
        "activations ",
        "with selective activation checkpointing about",
        "with full activation checkpointing about",
    ):
        assert word in shown
