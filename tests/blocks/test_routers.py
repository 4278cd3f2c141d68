"""Routers against their formulas, written out token by token."""

import math

import pytest
import torch
from torch import Tensor

from moeut_compose.blocks.balance import Entropy
from moeut_compose.blocks.roles import Alive, Router, Routing
from moeut_compose.blocks.routers import MLPRouter, SigmoidRouter, SoftmaxRouter
from moeut_compose.blocks.steered_routers import BiasedSigmoidRouter, ReluRouter

D, E, K = 6, 5, 3


def prepared(router: Router) -> Router:
    torch.manual_seed(0)
    router.double()
    router.reset_parameters(scale=1.0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router.train()


def tokens() -> Tensor:
    return torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(routing: Routing, n_experts: int = E) -> Tensor:
    """Weights as `[B, T, H, E]`, zero where an expert is not chosen."""
    shape = (*routing.gate.shape[:-1], n_experts)
    return torch.zeros(shape, dtype=routing.gate.dtype).scatter_add(-1, routing.index, routing.gate)


def top(scores: Tensor, k: int) -> list[int]:
    """Indices of the k largest of a vector."""
    return sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def by_token(router: Router, weigh) -> Tensor:
    """`weigh(logits of one token) -> {expert: weight}`, applied to every token of one head."""
    x = tokens()
    expected = torch.zeros(2, 4, 1, E, dtype=torch.float64)
    for b in range(2):
        for t in range(4):
            for expert, weight in weigh(router.weight @ x[b, t]).items():
                expected[b, t, 0, expert] = weight
    return expected


def test_sigmoid_takes_the_top_k_with_their_sigmoids() -> None:
    router = prepared(SigmoidRouter(D, n_experts=E, top_k=K))
    expected = by_token(router, lambda z: {e: z[e].sigmoid() for e in top(z, K)})
    torch.testing.assert_close(dense(router(tokens(), None)), expected)


def test_every_head_chooses_among_its_own_experts() -> None:
    router = prepared(SigmoidRouter(D, n_experts=E, top_k=K, n_heads=2, attention=True))
    both = dense(router(tokens(), None))
    for head in range(2):
        single = SigmoidRouter(D, n_experts=E, top_k=K).double()
        with torch.no_grad():
            single.weight.copy_(router.weight[head * E : (head + 1) * E])
        torch.testing.assert_close(both[:, :, head], dense(single(tokens(), None)).squeeze(2))


@pytest.mark.parametrize("normalize", [False, True])
def test_softmax_before_top_k(normalize: bool) -> None:
    router = prepared(SoftmaxRouter(D, n_experts=E, top_k=K, after_top_k=False, normalize=normalize))

    def weigh(z: Tensor) -> dict[int, Tensor]:
        p = z.exp() / z.exp().sum()
        total = sum(p[e] for e in top(z, K)) if normalize else 1.0
        return {e: p[e] / total for e in top(z, K)}

    torch.testing.assert_close(dense(router(tokens(), None)), by_token(router, weigh))


def test_softmax_after_top_k() -> None:
    router = prepared(SoftmaxRouter(D, n_experts=E, top_k=K, after_top_k=True, normalize=False))

    def weigh(z: Tensor) -> dict[int, Tensor]:
        total = sum(z[e].exp() for e in top(z, K))
        return {e: z[e].exp() / total for e in top(z, K)}

    torch.testing.assert_close(dense(router(tokens(), None)), by_token(router, weigh))


def test_mlp_renormalises_a_softmax_of_two_layers() -> None:
    router = prepared(MLPRouter(D, n_experts=E, top_k=K))
    x = tokens()
    hidden = torch.tanh(x @ router.inner.weight.T + router.inner.bias)
    p = (hidden @ router.weight.T).softmax(-1)
    kept = torch.zeros_like(p)
    for b in range(2):
        for t in range(4):
            for expert in top(p[b, t], K):
                kept[b, t, expert] = p[b, t, expert]
    torch.testing.assert_close(dense(router(x, None)).squeeze(2), kept / (kept.sum(-1, keepdim=True) + 1e-6))


def test_sampling_draws_distinct_experts_and_only_in_training() -> None:
    router = prepared(MLPRouter(D, n_experts=E, top_k=K, n_sampled=2))
    drawn = [router(tokens(), None).index for _ in range(20)]
    assert any(not torch.equal(first.sort()[0], drawn[0].sort()[0]) for first in drawn)
    assert all((index.sort()[0].diff() > 0).all() for index in drawn)
    router.eval()
    assert torch.equal(router(tokens(), None).index, router(tokens(), None).index)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_selection_bias_moves_the_choice_and_not_the_weights(normalize: bool) -> None:
    router = BiasedSigmoidRouter(
        D, n_experts=E, top_k=K, update_rate=0.1, normalize=normalize, gate_scale=2.5
    )
    prepared(router)
    router.selection_bias.copy_(torch.tensor([0.9, -0.9, 0.3, 0.0, 0.5]))

    def weigh(z: Tensor) -> dict[int, Tensor]:
        s = z.sigmoid()
        chosen = top(s + router.selection_bias, K)
        total = sum(s[e] for e in chosen) if normalize else 1.0
        return {e: 2.5 * s[e] / total for e in chosen}

    torch.testing.assert_close(dense(router(tokens(), None)), by_token(router, weigh))
    without = by_token(router, lambda z: dict.fromkeys(top(z, K), 1.0)) > 0
    assert not torch.equal(dense(router(tokens(), None)) > 0, without)


def test_relu_takes_every_positive_score() -> None:
    router = prepared(ReluRouter(D, n_experts=E, top_k=2, max_active=E))
    expected = by_token(router, lambda z: {e: z[e] for e in range(E) if z[e] > 0})
    torch.testing.assert_close(dense(router(tokens(), None)), expected)
    capped = prepared(ReluRouter(D, n_experts=E, top_k=2, max_active=2))
    expected = by_token(capped, lambda z: {e: z[e] for e in top(z, 2) if z[e] > 0})
    torch.testing.assert_close(dense(capped(tokens(), None)), expected)


def every_router(**options) -> list[Router]:
    return [
        SigmoidRouter(D, n_experts=E, top_k=K, **options),
        SoftmaxRouter(D, n_experts=E, top_k=K, after_top_k=False, normalize=False, **options),
        SoftmaxRouter(D, n_experts=E, top_k=K, after_top_k=False, normalize=True, **options),
        SoftmaxRouter(D, n_experts=E, top_k=K, after_top_k=True, normalize=False, **options),
        BiasedSigmoidRouter(D, n_experts=E, top_k=K, update_rate=0.1, normalize=True, **options),
        ReluRouter(D, n_experts=E, top_k=K, max_active=E, **options),
        MLPRouter(D, n_experts=E, top_k=K, **options),
    ]


@pytest.mark.parametrize("router", every_router(), ids=lambda router: type(router).__name__)
def test_the_weights_carry_gradient_to_the_router(router: Router) -> None:
    prepared(router)
    routing = router(tokens(), None)
    (routing.gate * torch.arange(1.0, routing.gate.shape[-1] + 1)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_softmax_top_1_carries_gradient() -> None:
    router = prepared(SoftmaxRouter(D, n_experts=E, top_k=1, after_top_k=False, normalize=False))
    router(tokens(), None).gate.sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("router", every_router(expert_dropout=0.5), ids=lambda router: type(router).__name__)
def test_dropout_hides_experts_in_training_alone(router: Router) -> None:
    prepared(router)
    x = tokens().repeat(50, 1, 1)
    kept = (dense(router(x, None)) > 0).double().mean((0, 1, 2))
    router.eval()
    before = (dense(router(x, None)) > 0).double().mean((0, 1, 2))
    assert torch.equal(router(x, None).gate, router(x, None).gate)
    favourite = before.argmax()
    assert kept[favourite] < 0.75 * before[favourite]


def test_a_feedforward_weighs_hidden_experts_with_nothing_and_attention_as_before() -> None:
    torch.manual_seed(0)
    for attention in (False, True):
        router = prepared(SigmoidRouter(D, n_experts=E, top_k=E, attention=attention, expert_dropout=0.9))
        weights = dense(router(tokens(), None))
        assert bool((weights == 0).any()) is not attention
        assert torch.isfinite(weights).all()


@pytest.mark.parametrize("router", every_router(), ids=lambda router: type(router).__name__)
def test_tokens_at_rest_weigh_nothing_and_the_others_as_before(router: Router) -> None:
    prepared(router)
    alive = torch.ones(2, 4, dtype=torch.float64)
    alive[0, 1] = alive[1, 3] = 0.0
    rested, awake = dense(router(tokens(), Alive(alive))), dense(router(tokens(), None))
    assert (rested[alive == 0] == 0).all()
    torch.testing.assert_close(rested[alive > 0], awake[alive > 0], atol=1e-5, rtol=0)


def test_scores_are_computed_in_float32_at_least() -> None:
    router = SigmoidRouter(D, n_experts=E, top_k=K, balance=[Entropy(0.01, "sequence")])
    router.reset_parameters(scale=1.0)
    routing = router.train().bfloat16()(tokens().bfloat16(), None)
    assert routing.gate.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in routing.stats.values())


def test_attention_rows_keep_their_deviation_over_that_of_unit_rows() -> None:
    torch.manual_seed(3)
    router = SigmoidRouter(64, n_experts=4, top_k=2, n_heads=2, attention=True)
    router.reset_parameters(scale=0.5)
    torch.manual_seed(3)
    raw = torch.nn.init.normal_(torch.empty(8, 64), std=0.5 / math.sqrt(64))
    unit = raw / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(router.weight.data, unit * raw.std(1, keepdim=True) / unit.std())
