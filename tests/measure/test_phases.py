"""Prefill, decoding and training, against the built model and against one token at a time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moeut_compose import Cache
from moeut_compose.build import build_model
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.phases import count_cache, count_phases
from moeut_compose.spec.find import list_specs
from moeut_compose.spec.io import load_spec

TINY = [found.name for found in list_specs("architectures") if found.name.endswith("_tiny")]
T = 12


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_decoded_token_and_its_cache_are_those_of_the_built_model(name: str) -> None:
    spec = load_spec(name)
    model = build_model(spec, device="meta").eval()
    ids = torch.zeros(1, T + 1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        cache = model(ids[:, :T], cache=Cache()).cache
    phases = count_phases(spec, T)
    assert counter.get_total_flops() == 2 * phases.prefill
    with FlopCounterMode(display=False) as counter:
        model(ids[:, T:], cache=cache)
    assert counter.get_total_flops() == 2 * phases.decode
    counted = count_cache(spec)
    memories = cache.memories
    assert len(memories) == counted.applications
    n_values = sum(part.numel() for memory in memories for part in memory)
    assert n_values == T * counted.values_per_token
    assert sum(part.numel() * part.element_size() for memory in memories for part in memory) == (
        T * counted.bytes_per_token("fp32")
    )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("seq_len", [1, 2, 7])
def test_the_causal_count_is_the_mean_over_positions(name: str, seq_len: int) -> None:
    spec = load_spec(name)
    one_by_one = sum(count_macs(spec, position).total_per_token for position in range(1, seq_len + 1))
    assert count_macs(spec, seq_len, causal=True).total_per_token * seq_len == one_by_one
    assert count_phases(spec, seq_len, causal=True).prefill == one_by_one


def test_training_is_three_passes_and_checkpointing_a_fourth_of_the_layers() -> None:
    spec = load_spec("moeut_tiny")
    forward, phases = count_macs(spec, 64), count_phases(spec, 64)
    assert phases.training_per_token == 3 * forward.total_per_token
    assert phases.training_checkpointed_per_token == 4 * forward.layers_per_token + 3 * forward.head_per_token


def test_a_shared_layer_caches_each_of_its_passes() -> None:
    once, thrice = (count_cache(load_spec("moeut_tiny", [f"stages.0.repeats={n}"])) for n in (1, 3))
    assert thrice.values_per_token == 3 * once.values_per_token
    assert thrice.bytes_per_token("bf16") * 2 == thrice.bytes_per_token("fp32")
    switch_head = load_spec("moeut_tiny").stages[0].layers[0].mixer
    assert once.members[0].values_per_application == 2 * switch_head.n_heads * switch_head.d_head


def test_the_published_formula_has_no_causal_form() -> None:
    with pytest.raises(ValueError, match="no causal form"):
        count_macs(load_spec("moeut_tiny"), 8, "paper", causal=True)
