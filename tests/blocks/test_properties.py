"""What holds for every architecture that can be written down."""

from collections import defaultdict

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeut_compose import Cache
from moeut_compose.blocks.graves_act import GravesACT
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.stick_breaking import StickBreaking
from moeut_compose.build import build_model
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.measure.trace import trace_macs
from moeut_compose.spec.io import dump_yaml, parse_spec
from moeut_compose.spec.model import ModelSpec
from tests.strategies import model_specs

LENGTH = 9
examples = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def built(spec: ModelSpec) -> LanguageModel:
    """In float64, without a zero left that would hide a fault."""
    model = build_model(spec, dtype=torch.float64, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.add_(noise, alpha=0.2)
    return model


def tokens(spec: ModelSpec, seed: int = 0) -> Tensor:
    return torch.randint(spec.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@examples
@given(model_specs())
def test_closed_forms_equal_the_built_model(spec: ModelSpec) -> None:
    model = build_model(spec, device="meta")
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == count_params(spec).total
        == spec.num_params()
    )
    assert trace_macs(spec, LENGTH).by_component == count_macs(spec, LENGTH).by_component


@examples
@given(model_specs())
def test_a_step_is_finite_and_reaches_the_embedding(spec: ModelSpec) -> None:
    model = built(spec).train()
    out = model(tokens(spec), targets=tokens(spec, seed=1))
    loss = out.cross_entropy + sum(out.losses.values())
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert gradients["embedding.weight"].abs().sum() > 0
    assert all(torch.isfinite(value).all() for value in out.stats.values())


@examples
@given(model_specs())
@torch.no_grad()
def test_later_tokens_change_nothing(spec: ModelSpec) -> None:
    model = built(spec).eval()
    ids, changed = tokens(spec), tokens(spec)
    changed[:, 5:] = (changed[:, 5:] + 1) % spec.vocab_size
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)


@examples
@given(model_specs())
@torch.no_grad()
def test_decoding_in_pieces_equals_one_pass(spec: ModelSpec) -> None:
    model = built(spec).eval()
    ids = tokens(spec)
    cache, parts = Cache(), []
    for piece in ids.split([4, 3, 1, 1], dim=1):
        out = model(piece, cache=cache)
        cache, parts = out.cache, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-8)


@examples
@given(model_specs(halting=False), st.sampled_from(["act", "graves_act"]))
@torch.no_grad()
def test_gates_that_never_halt_leave_the_plain_loop(spec: ModelSpec, kind: str) -> None:
    data = spec.model_dump(mode="json")
    for stage in data["stages"]:
        if stage["pattern"] == "ABAB":
            stage["halting"] = {"kind": kind}
    plain, halting = (
        built(spec).eval(),
        build_model(ModelSpec.model_validate(data), dtype=torch.float64).eval(),
    )
    halting.load_state_dict(plain.state_dict(), strict=False)
    for stage in halting.stages:
        if isinstance(stage.halting, StickBreaking):
            stage.halting.inner.weight.zero_()
            stage.halting.inner.bias.fill_(10.0)
            stage.halting.outer.weight[0] = 10.0
            stage.halting.outer.weight[1] = -10.0
        elif isinstance(stage.halting, GravesACT):
            stage.halting.gate.weight.zero_()
            stage.halting.gate.bias.fill_(-1000.0)
    ids = tokens(spec)
    torch.testing.assert_close(halting(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


@examples
@given(model_specs())
def test_specs_survive_yaml(spec: ModelSpec) -> None:
    assert parse_spec(dump_yaml(spec)) == spec


def test_the_strategy_reaches_every_member_of_every_union() -> None:
    found: dict[str, set[str]] = defaultdict(set)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(model_specs())
    def collect(spec: ModelSpec) -> None:
        found["position"].add(spec.position.kind)
        for stage in spec.stages:
            for name in ("halting", "inject", "step"):
                found[name].add(getattr(stage, name).kind)
            for layer in stage.layers:
                found["mixer"].add(layer.mixer.kind)
                found["feedforward"].add(layer.feedforward.kind)
                if layer.feedforward.kind == "moe":
                    found["router"].add(layer.feedforward.router.kind)

    collect()
    assert found == EXPECTED


EXPECTED = {
    "mixer": {"attention", "switch_head", "mixture_of_attention"},
    "feedforward": {"dense", "sigma_moe", "moe"},
    "router": {"sigmoid", "softmax", "biased_sigmoid", "relu", "mlp"},
    "halting": {"none", "act", "graves_act"},
    "inject": {"none", "add", "gate", "concat"},
    "step": {"none", "sinusoidal", "learned"},
    "position": {"none", "rope", "relative"},
}
