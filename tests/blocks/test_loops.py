"""Looped stages: what passes share, and what they have of their own."""

import math

import pytest
import torch
from torch import Tensor

from moeut_compose.blocks.loops import ConcatInjection, GateInjection, SinusoidalStep
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec

LOOP = ["vocab_size=40", "context_length=16", "d_model=24", "stages.0.repeats=3", "stages.0.layers.0.count=2"]


def ids() -> Tensor:
    return torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def loop(name: str, *overrides: str) -> ModelSpec:
    return load_spec(name, [*LOOP, *overrides])


def built(spec: ModelSpec, noise: float = 0.0) -> LanguageModel:
    model = build_model(spec, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model


@pytest.mark.parametrize("name", ["dense_tiny", "moeut_tiny", "sut_tiny"])
@pytest.mark.parametrize("option", ["lora={rank: 2}", "norms=per_repeat", "step={kind: learned}"])
def test_small_changes_start_as_none(name: str, option: str) -> None:
    """A fresh model with an option computes what it computes without."""
    model = built(loop(name, f"stages.0.{option}"))
    plain = built(loop(name))
    own = model.state_dict()
    plain.load_state_dict(
        {
            key: own[key][0] if own[key].dim() > value.dim() else own[key]
            for key, value in plain.state_dict().items()
        }
    )
    torch.testing.assert_close(model(ids()).logits, plain(ids()).logits, rtol=1e-12, atol=1e-12)


def unrolled(model: LanguageModel, spec: ModelSpec, target: ModelSpec) -> LanguageModel:
    """The same function with six layers of their own: W + U_r D_r and the norms of pass r written out."""
    weights, flat = model.state_dict(), build_model(target, dtype=torch.float64)
    for name in flat.state_dict():
        if not name.startswith("stages.0.layers."):
            flat.state_dict()[name].copy_(weights[name])
            continue
        place, rest = name.removeprefix("stages.0.layers.").split(".", 1)
        repeat, member = divmod(int(place), 2)
        source = f"stages.0.layers.{member}.{rest}"
        value = weights[source]
        if value.dim() > flat.state_dict()[name].dim():
            value = value[repeat]
        up = weights.get(source.replace(".weight", ".lora_up"))
        if up is not None and rest.endswith(".weight") and "norm" not in rest:
            value = value + up[repeat] @ weights[source.replace(".weight", ".lora_down")][repeat]
        flat.state_dict()[name].copy_(value)
    return flat


@pytest.mark.parametrize("name", ["dense_tiny", "moeut_tiny", "switchhead_tiny"])
def test_low_rank_changes_and_own_norms_are_those_of_each_pass(name: str) -> None:
    spec = loop(name, "stages.0.lora={rank: 2}", "stages.0.norms=per_repeat")
    flat = loop(name, "stages.0.repeats=1", "stages.0.layers.0.count=6")
    model = built(spec, noise=0.1)
    wanted = unrolled(model, spec, flat)(ids()).logits
    torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-10, atol=1e-10)


def passes(model: LanguageModel, x: Tensor, inject) -> Tensor:
    """Three passes over the layers of the only stage, `inject(state, repeat)` before each."""
    state = x
    for repeat in range(3):
        state = inject(state, repeat)
        for layer in model.stages[0].layers:
            state = layer(state, state).hidden
    return state


@pytest.mark.parametrize("kind", ["none", "add", "gate", "concat"])
def test_injection_by_hand(kind: str) -> None:
    model = built(loop("dense_tiny", f"stages.0.inject={{kind: {kind}}}"), noise=0.3)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    injection = model.stages[0].injection

    def inject(state: Tensor, repeat: int) -> Tensor:
        match kind:
            case "none":
                return state
            case "add":
                return state + x if repeat else x
            case "gate":
                both = torch.cat((state, x), dim=-1)
                gate = torch.sigmoid(both @ injection.gate.weight.T + injection.gate.bias)
                return gate * state + (1 - gate) * x if repeat else x
            case _:
                before = state if repeat else torch.zeros_like(x)
                return torch.cat((before, x), dim=-1) @ injection.linear.weight.T

    torch.testing.assert_close(model.stages[0](x).hidden, passes(model, x, inject))


def test_injections_begin_evenly() -> None:
    torch.manual_seed(0)
    gate, concat = GateInjection(64), ConcatInjection(64)
    gate.reset_parameters()
    concat.reset_parameters()
    state, x = torch.randn(2, 50, 64), torch.randn(2, 50, 64)
    torch.testing.assert_close(gate(state, x), (state + x) / 2)
    assert concat(state, x).std().item() == pytest.approx(1.0, rel=0.05)


def test_only_whole_groups_are_injected() -> None:
    with pytest.raises(ValueError, match="inject acts between passes"):
        loop("dense_tiny", "stages.0.inject={kind: add}", "stages.0.pattern=AABB")
    with pytest.raises(ValueError, match="step acts between passes"):
        loop("dense_tiny", "stages.0.step={kind: learned}", "stages.0.pattern=AABB")


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoids_of_step_and_position(d_model: int) -> None:
    step = SinusoidalStep(d_model, positions=True)
    marked = step(torch.zeros(1, 4, d_model, dtype=torch.float64), repeat=2, start=3)[0]
    for offset in range(4):
        for channel in range(d_model):
            rate = 10000.0 ** (-(channel // 2 * 2) / d_model)
            wave = math.cos if channel % 2 else math.sin
            wanted = wave((3 + offset) * rate) + wave(2 * rate)
            assert marked[offset, channel].item() == pytest.approx(wanted, abs=1e-6)
    alone = SinusoidalStep(d_model, positions=False)(torch.zeros(1, 4, d_model), repeat=2, start=3)[0]
    assert torch.equal(alone[0], alone[3])


@pytest.mark.parametrize(
    "kind", ["{kind: sinusoidal}", "{kind: sinusoidal, positions: false}", "{kind: learned}"]
)
def test_every_pass_knows_its_number(kind: str) -> None:
    model = built(loop("dense_tiny", f"stages.0.step={kind}"), noise=0.3)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    step = model.stages[0].step
    wanted = passes(model, x, lambda state, repeat: step(state, repeat, 0))
    torch.testing.assert_close(model.stages[0](x).hidden, wanted)
    assert not torch.allclose(step(x, 0, 0), step(x, 1, 0))


LOOPED = [("moeut_tiny", 1), ("looped_tiny", 1), ("relaxed_recursive_tiny", 3), ("sut_tiny", 3)]


@pytest.mark.parametrize(("name", "n_graphs"), LOOPED)
@torch.no_grad()
def test_one_compiled_layer_serves_all_passes(name: str, n_graphs: int) -> None:
    """Later passes run what was compiled for earlier ones; weights of each pass and halting add a graph or two."""
    torch._dynamo.reset()
    spec = load_spec(name, ["vocab_size=40", "context_length=16"])
    model = build_model(spec).eval()
    stage = next(stage for stage in model.stages if len(stage.schedule) > len(stage.layers))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = model(ids()).logits
    assert len(stage.schedule) >= 3
    stage.layers[0].compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(model(ids()).logits, plain)
    assert len(graphs) <= n_graphs
    torch._dynamo.reset()


KINDS = [
    "entropy",
    "switch",
    "z_loss",
    "cv_squared",
    "mutual_information",
    "mutual_information_as_coded",
    "relu_l1",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_repeats_do_not_scale_a_balance_term(kind: str, scope: str) -> None:
    """Layers that leave their input as it is see the same tokens in every pass."""
    terms, weights = [], None
    for repeats in (1, 3):
        router = "{kind: relu}" if kind == "relu_l1" else "{kind: softmax}"
        balance = f"{{kind: {kind}, weight: 0.5, scope: {scope}}}"
        experts = f"{{kind: moe, n_experts: 5, d_expert: 4, top_k: 2, router: {router}, balance: {balance}}}"
        spec = loop("moeut_tiny", f"stages.0.layers.0.feedforward={experts}", f"stages.0.repeats={repeats}")
        model = built(spec)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)  # the depth is part of the initialisation
        with torch.no_grad():
            for layer in model.stages[0].layers:
                layer.mixer.output.zero_()
                layer.feedforward.down.zero_()
        losses = model.train()(ids()).losses
        terms.append(losses[f"stages.0.layers.1.feedforward.router.{kind}"])
    assert terms[0].abs() > 0
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-12, atol=0)
