"""Two hundred random architectures: the closed forms equal what fvcore counts on the built module, part by part."""

import pytest
from hypothesis import HealthCheck, given, settings

from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params, params_by_component, params_by_member
from moeut_compose.measure.trace import count_built_params, trace_macs
from moeut_compose.spec.model import ModelSpec
from tests.strategies import model_specs

LENGTH = 5


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    model_specs(max_stages=1)
)  # several stages: tests/blocks/test_properties.py and the built-in architectures
def test_closed_forms_equal_fvcore(spec: ModelSpec) -> None:
    assert count_built_params(spec) == params_by_component(spec)
    assert trace_macs(spec, LENGTH).by_component == count_macs(spec, LENGTH).by_component
    count = count_params(spec)
    assert sum(params_by_component(spec).values()) == count.total
    own = sum(stage.own_params(spec.d_model) for stage in spec.stages)
    assert sum(member.total for member in params_by_member(spec)) + own == count.layers
