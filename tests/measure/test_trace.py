"""The closed-form count and the traced count are two opinions on the same model; they must agree to the unit."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moeut_compose.build import build_model
from moeut_compose.measure import trace
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params, params_by_component
from moeut_compose.spec.find import list_specs
from moeut_compose.spec.io import load_spec

NAMES = [found.name for found in list_specs("architectures")]


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_equals_the_built_model(name: str) -> None:
    spec = load_spec(name)
    assert trace.count_built_params(spec) == params_by_component(spec)
    assert sum(params_by_component(spec).values()) == count_params(spec).total
    traced, closed = trace.trace_macs(spec), count_macs(spec)
    assert traced.by_component == closed.by_component
    assert traced.by_module[""] == closed.total_per_token


@pytest.mark.parametrize("name", ["dense_tiny", "moeut_tiny", "sigma_moe_tiny", "sut_tiny"])
def test_pytorchs_own_counter_agrees(name: str) -> None:
    spec = load_spec(name)
    model = build_model(spec, device="meta").eval()
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == 2 * 64 * count_macs(spec, 64).total_per_token


def test_length_changes_scores_only() -> None:
    spec = load_spec("moeut_tiny")
    short, long = trace.trace_macs(spec, 32).by_component, trace.trace_macs(spec, 96).by_component
    assert long.pop("attn_scores_values") == 3 * short.pop("attn_scores_values")
    assert long == short


def test_an_operator_without_a_formula_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(trace.HANDLES, "aten::scaled_dot_product_attention")
    with pytest.raises(trace.UncountedOperator, match="scaled_dot_product_attention"):
        trace.trace_macs(load_spec("dense_tiny"), 16)


def test_modules_add_up() -> None:
    traced = trace.trace_macs(load_spec("moeut_tiny"), 16)
    members = [traced.by_module[f"stages.0.layers.{index}"] for index in range(2)]
    assert sum(members) + traced.by_module["head"] == traced.by_module[""]
    assert isinstance(build_model(load_spec("moeut_tiny"), device="meta").head, nn.Linear)
