"""The language model as a whole: what it returns, what it shares, what it must not see."""

import pytest
import torch

from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec

TINY = ["dense_tiny", "moeut_tiny", "sigma_moe_tiny", "sut_tiny"]


def ids(batch: int = 2, length: int = 12, vocab_size: int = 2048) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build_model(load_spec(name), seed=2).train()
    out = model(ids(4, 64), targets=ids(4, 64))
    (out.cross_entropy + sum(out.losses.values())).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_the_future_is_unseen(name: str) -> None:
    model = build_model(load_spec(name), dtype=torch.float64).eval()
    before = ids()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 2048
    with torch.no_grad():
        left, right = model(before).logits, model(after).logits
    torch.testing.assert_close(left[:, :7], right[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(left[:, 7:], right[:, 7:])


def test_shared_layers_exist_once() -> None:
    model = build_model(load_spec("moeut_tiny"), device="meta")
    layers = {name.split(".")[3] for name in model.state_dict() if name.startswith("stages.0.layers.")}
    assert layers == {"0", "1"}


def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_uses() -> None:
    shared = build_model(
        load_spec("moeut_tiny", ["stages.0.layers.0.count=1", "stages.0.repeats=2"]), dtype=torch.float64
    )
    twice = build_model(
        load_spec("moeut_tiny", ["stages.0.layers.0.count=2", "stages.0.repeats=1"]), dtype=torch.float64
    )
    weights = dict(shared.state_dict())
    weights |= {name.replace("layers.0", "layers.1"): w for name, w in weights.items() if "layers.0" in name}
    twice.load_state_dict(weights)
    for model in (shared, twice):
        model.eval()(ids(), targets=ids()).cross_entropy.backward()
    copies = dict(twice.named_parameters())
    for name, parameter in shared.named_parameters():
        wanted = copies[name].grad
        if "layers.0" in name:
            wanted = wanted + copies[name.replace("layers.0", "layers.1")].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12)


def test_losses_only_in_training() -> None:
    model = build_model(load_spec("sut_tiny"))
    assert model.train()(ids()).losses.keys() == {
        "stages.0.halting.act",
        "stages.0.layers.0.mixer.router.mutual_information_as_coded",
        "stages.0.layers.0.feedforward.router.mutual_information_as_coded",
    }
    assert model.eval()(ids()).losses == {}


def test_targets_replace_logits() -> None:
    model = build_model(load_spec("dense_tiny")).eval()
    tokens, targets = ids(), ids().roll(1, 1)
    targets[0, :5] = -100
    logits, loss = model(tokens), model(tokens, targets=targets)
    assert loss.logits is None and logits.cross_entropy is None
    wanted = torch.nn.functional.cross_entropy(logits.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.cross_entropy, wanted)


def test_weights_follow_the_seed() -> None:
    spec = load_spec("moeut_tiny")
    first, again, other = (build_model(spec, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    build_model(load_spec("dense_tiny"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", ["true", "false"])
def test_tied_head(bias: str) -> None:
    spec = load_spec("dense_tiny", ["head.tied=true", f"head.bias={bias}"])
    model = build_model(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.num_params()
    assert "head.weight" not in model.state_dict()
    assert model(ids()).logits.shape == (2, 12, 2048)


@pytest.mark.parametrize("name", TINY)
def test_layers_compile_without_graph_breaks(name: str) -> None:
    model = build_model(load_spec(name), seed=4).train()
    layer = model.stages[0].layers[0]
    x = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    plain = layer(x, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x)
    torch.testing.assert_close(compiled.hidden, plain.hidden)
    assert compiled.stats.keys() == plain.stats.keys()


@pytest.mark.parametrize("name", TINY)
def test_loading_needs_no_initialisation(name: str) -> None:
    spec = load_spec(name)
    drawn, empty = build_model(spec, seed=8).eval(), build_model(spec, init=False).eval()
    empty.load_state_dict(drawn.state_dict())
    with torch.no_grad():
        assert torch.equal(drawn(ids()).logits, empty(ids()).logits)
