"""Counts of the published runs against the file measured on the original classes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.spec.io import load_spec

VARIANTS = {
    run["name"]: run
    for run in yaml.safe_load((Path(__file__).parents[1] / "reference" / "variants.yaml").read_text())[
        "variants"
    ]
}
RUNS = {
    "dense_244m": "c4_baseline_big_rope_nodrop",
    "moeut_244m": "c4_moeut_big_matched_rope_preln_linear_norot_nosm1",
    "moeut_44m": "c4_moeut_small_matched_rope_noln_long",
    "sigma_moe_244m": "c4_moeut_big_matched_rope_noln_g18",
    "sut_244m": "c4_sut_big_lessloss2_ffflopmatch_attmatch_actloss",
}


@pytest.fixture(params=RUNS)
def pair(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, VARIANTS[RUNS[request.param]]


def test_parameters(pair: tuple[str, dict[str, Any]]) -> None:
    count, run = count_params(load_spec(pair[0])), pair[1]
    assert (count.total, count.layers, count.embedding, count.head) == (
        run["params"],
        run["params_layers"],
        run["params_embedding"],
        run["params_lm_head"],
    )


def test_exact_macs(pair: tuple[str, dict[str, Any]]) -> None:
    count, run = count_macs(load_spec(pair[0]), 1024), pair[1]
    assert count.layers_per_token == run["macs_exact_per_token"]
    assert count.head_per_token == run["lm_head_macs_per_token"]
    assert count.by_component == run["macs_exact_breakdown"] | {"lm_head": run["lm_head_macs_per_token"]}
    assert count.total_per_token == count.layers_per_token + count.head_per_token


def test_paper_macs(pair: tuple[str, dict[str, Any]]) -> None:
    spec, run = load_spec(pair[0]), pair[1]
    if run["macs_per_sequence"] is None:
        with pytest.raises(ValueError, match="undefined"):
            count_macs(spec, 1024, "paper")
    else:
        assert count_macs(spec, 1024, "paper").layers_per_token * 1024 == run["macs_per_sequence"]


def test_active_and_unrolled_parameters_of_a_dense_model_are_all_but_the_embedding_table() -> None:
    count = count_params(load_spec("dense_244m"))
    assert count.active_per_token == count.unrolled_per_token == count.total - count.embedding + 1024


def test_unrolling_counts_shared_layers_once_per_application() -> None:
    once, thrice = (
        count_params(load_spec("moeut_tiny", overrides=[f"stages.0.repeats={repeats}"])) for repeats in (1, 3)
    )
    assert once.total == thrice.total and once.active_per_token == thrice.active_per_token
    outside = once.active_per_token - (thrice.unrolled_per_token - once.unrolled_per_token) // 2
    assert once.unrolled_per_token == once.active_per_token
    assert outside == 128 + 256 + 2048 * 128 + 2048


@pytest.mark.parametrize("seq_len", [0, -3])
def test_lengths_below_one_are_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match="below 1"):
        count_macs(load_spec("dense_tiny"), seq_len)
