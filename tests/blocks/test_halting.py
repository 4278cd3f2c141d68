"""Halting rules: their weights, their losses, and what they must not change."""

import pytest
import torch
from torch import Tensor

from moeut_compose.blocks.graves_act import GravesACT
from moeut_compose.blocks.halting import AnyHalting
from moeut_compose.blocks.model import LanguageModel
from moeut_compose.blocks.stages import skip_resting
from moeut_compose.blocks.stats import totals
from moeut_compose.blocks.stick_breaking import StickBreaking
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec
from moeut_compose.spec.model import ModelSpec

B, T, D = 2, 7, 5
ACT = "{kind: act, weight: 0.1}"
GRAVES = "{kind: graves_act, weight: 0.1, gate_bias: -1.0}"


def small(name: str, *overrides: str) -> ModelSpec:
    size = ["vocab_size=50", "d_model=32", "context_length=32", "stages.0.layers.0.feedforward.n_experts=12"]
    return load_spec(name, [*size, *overrides])


def built(spec: ModelSpec, seed: int = 0) -> LanguageModel:
    """The model in float64, with gates that do not start even."""
    model = build_model(spec, dtype=torch.float64, seed=seed)
    torch.manual_seed(seed)
    for stage in model.stages:
        for parameter in stage.halting.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def ids(seed: int = 1) -> Tensor:
    return torch.randint(50, (B, 16), generator=torch.Generator().manual_seed(seed))


def rules() -> list[AnyHalting]:
    return [
        StickBreaking(D, threshold=0.9, weight=0.1),
        GravesACT(D, threshold=0.9, weight=0.1, gate_bias=-1.0),
    ]


def drawn(rule: AnyHalting, std: float = 1.0) -> AnyHalting:
    torch.manual_seed(0)
    rule.double().reset_parameters()
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return rule.train()


def states(n_passes: int) -> Tensor:
    return torch.randn(n_passes, B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def passes_through(rule: AnyHalting, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run the rule on given states of each pass."""
    state = rule.begin(torch.zeros_like(hidden[0]))
    for repeat, new in enumerate(hidden):
        if repeat > 0:
            state = rule.decide(state, repeat)
        state = rule.absorb(state, new)
    return rule.finish(state)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("n_passes", [1, 2, 3, 8])
@pytest.mark.parametrize("std", [0.1, 1.0, 5.0])
def test_weights_sum_to_one(rule: AnyHalting, n_passes: int, std: float) -> None:
    """A channel that is equal in all states stays as it is, wherever a token stops, at the last pass too."""
    drawn(rule, std)
    hidden = states(n_passes)
    hidden[..., 0] = 3.0
    output, _, _ = passes_through(rule, hidden)
    torch.testing.assert_close(
        output[..., 0], torch.full((B, T), 3.0, dtype=torch.float64), rtol=1e-12, atol=0
    )


def graves_by_hand(rule: GravesACT, hidden: Tensor, b: int, t: int) -> tuple[Tensor, int, float]:
    """One token: its output, its passes, its remainder."""
    total, output, state = 0.0, torch.zeros(D, dtype=torch.float64), None
    for n, new in enumerate(hidden):
        state = new[b, t]
        probability = torch.sigmoid(rule.gate.weight[0] @ state + rule.gate.bias[0]).item()
        if n == len(hidden) - 1 or total + probability >= rule.threshold:
            return output + (1 - total) * state, n + 1, 1 - total
        output, total = output + probability * state, total + probability
    raise AssertionError("unreachable")


@pytest.mark.parametrize("n_passes", [1, 4, 10])
def test_graves_act_by_hand(n_passes: int) -> None:
    rule = drawn(GravesACT(D, threshold=0.9, weight=0.1, gate_bias=0.0))
    hidden = states(n_passes)
    output, losses, stats = passes_through(rule, hidden)
    tokens = [(b, t) for b in range(B) for t in range(T)]
    wanted = {place: graves_by_hand(rule, hidden, *place) for place in tokens}
    for (b, t), (mixture, _, _) in wanted.items():
        torch.testing.assert_close(output[b, t], mixture)
    ponder = sum(n + remainder for _, n, remainder in wanted.values()) / (B * T)
    assert losses["act"].item() == pytest.approx(0.1 * ponder)
    assert stats["passes"].sum().item() == sum(n for _, n, _ in wanted.values())
    assert stats["tokens"].sum().item() == B * T
    assert n_passes == 1 or len({n for _, n, _ in wanted.values()}) > 1


def test_graves_counts_passes_without_gradient_and_learns_from_the_remainder() -> None:
    rule = drawn(GravesACT(D, threshold=0.9, weight=1.0, gate_bias=0.0), std=0.01)
    torch.nn.init.constant_(rule.gate.bias, -2.0)
    hidden = states(3)
    _, losses, _ = passes_through(rule, hidden)
    losses["act"].backward()
    # nobody stops early: the remainder is 1 - a_1 - a_2, the passes are constant
    probability = torch.sigmoid(rule.gate(hidden[:2]))
    wanted = -(probability * (1 - probability)).sum((0, 3)).mean()
    torch.testing.assert_close(rule.gate.bias.grad[0], wanted)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_the_task_alone_teaches_the_gate(halting: str) -> None:
    model = built(small("moeut_tiny", f"stages.0.halting={halting}"))
    model(ids(), targets=ids(2)).cross_entropy.backward()
    for name, parameter in model.stages[0].halting.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def never(model: LanguageModel) -> None:
    """Set the gates so that nobody ever halts."""
    for stage in model.stages:
        with torch.no_grad():
            if isinstance(stage.halting, StickBreaking):
                stage.halting.inner.weight.zero_()
                stage.halting.inner.bias.fill_(10.0)
                stage.halting.outer.weight[0] = 10.0
                stage.halting.outer.weight[1] = -10.0
            else:
                stage.halting.gate.weight.zero_()
                stage.halting.gate.bias.fill_(-1000.0)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
@pytest.mark.parametrize("name", ["moeut_tiny", "sut_tiny"])
def test_a_gate_that_never_halts_is_the_plain_loop(name: str, halting: str) -> None:
    spec = small(name, f"stages.0.halting={halting}")
    plain = small(name, "stages.0.halting={kind: none}")
    model = build_model(spec, dtype=torch.float64)
    never(model)
    reference = build_model(plain, dtype=torch.float64)
    weights = {key: value for key, value in model.state_dict().items() if ".halting." not in key}
    reference.load_state_dict(weights, strict=True)
    torch.testing.assert_close(model(ids()).logits, reference(ids()).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
@pytest.mark.parametrize("name", ["moeut_tiny", "sut_tiny"])
def test_skipping_tokens_at_rest_changes_nothing(name: str, halting: str) -> None:
    spec = small(name, f"stages.0.halting={halting}", "stages.0.repeats=8", "stages.0.halting.threshold=0.8")
    model = built(spec, seed=3).train()
    results = []
    for skip in (False, True):
        skip_resting(model, skip)
        model.zero_grad()
        out = model(ids(), targets=ids(2))
        loss = out.cross_entropy + sum(out.losses.values())
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), out.stats, gradients))
    (loss, stats, gradients), (skipped_loss, skipped_stats, skipped_gradients) = results
    assert stats["stages.0.halting.passes"].sum() < 8 * ids().numel()
    torch.testing.assert_close(skipped_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(skipped_stats, stats, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(skipped_gradients, gradients, rtol=1e-9, atol=1e-12)


def test_skipping_leaves_products_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import moeut_kernels as mk

    model = built(small("sut_tiny", "stages.0.repeats=8", "stages.0.halting.threshold=0.8"), seed=3).eval()
    rows: list[int] = []
    product = mk.expert_feedforward

    def counted(x: Tensor, *rest: object, **more: object) -> Tensor:
        rows.append(len(x))
        return product(x, *rest, **more)

    monkeypatch.setattr(mk, "expert_feedforward", counted)
    model(ids())
    assert rows == [ids().numel()] * 8
    rows.clear()
    skip_resting(model)
    model(ids())
    assert rows[0] == ids().numel() > rows[-1]
    assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_everybody_may_rest(halting: str) -> None:
    model = built(small("sut_tiny", f"stages.0.halting={halting}", "stages.0.halting.threshold=0.0"))
    masked = model(ids()).logits
    skip_resting(model)
    torch.testing.assert_close(model(ids()).logits, masked)
    if "graves" in halting:
        assert totals(model(ids()).stats)["stages.0.halting.passes"].item() == ids().numel()


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_the_expected_depth_is_reported_in_passes(halting: str) -> None:
    model = built(small("moeut_tiny", f"stages.0.halting={halting}")).eval()
    stats = totals(model(ids()).stats)
    mean = (stats["stages.0.halting.passes"] / stats["stages.0.halting.tokens"]).item()
    assert 1.0 < mean < 3.0
    never(model)
    stats = totals(model(ids()).stats)
    assert stats["stages.0.halting.passes"].item() == pytest.approx(3.0 * ids().numel())


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_a_token_halts_whatever_comes_later_or_beside_it(halting: str) -> None:
    model = built(small("moeut_tiny", f"stages.0.halting={halting}", "stages.0.repeats=6")).eval()
    whole, changed = ids(), ids()
    changed[:, 10:] = ids(5)[:, 10:]
    torch.testing.assert_close(model(changed).logits[:, :10], model(whole).logits[:, :10], rtol=0, atol=1e-12)
    alone = torch.cat([model(whole[:1]).logits, model(whole[1:]).logits])
    torch.testing.assert_close(alone, model(whole).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_moeut_halts_in_groups_of_two(halting: str) -> None:
    model = built(small("moeut_tiny", f"stages.0.halting={halting}")).train()
    out = model(ids(), targets=ids(2))
    assert "stages.0.halting.act" in out.losses
    assert "stages.0.layers.1.feedforward.router.entropy" in out.losses
    (out.cross_entropy + sum(out.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("halting", [ACT, GRAVES])
def test_low_precision_stays_low(halting: str) -> None:
    """Sums of a rule are wider than the model; what layers and the head read must not be."""
    once = ["vocab_size=50", "stages.0.layers.0.count=1", "stages.0.repeats=4"]
    model = built(load_spec("dense_tiny", [*once, f"stages.0.halting={halting}"]))
    wide = model(ids()).logits
    narrow = model.bfloat16()(ids()).logits
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=0.05)
