"""Feedback between steps: selection biases and the coefficient of the ReLU term."""

import pytest
import torch
from torch import Tensor, nn

from moeut_compose.blocks.balance import ReluL1
from moeut_compose.blocks.roles import Alive
from moeut_compose.blocks.stats import pool, totals, under
from moeut_compose.blocks.steered_routers import BiasedSigmoidRouter, ReluRouter, steer_routers

D, E, K = 4, 6, 2


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(batch, 8, D, generator=torch.Generator().manual_seed(batch))


def biased(update_rate: float = 0.1) -> BiasedSigmoidRouter:
    torch.manual_seed(0)
    router = BiasedSigmoidRouter(D, n_experts=E, top_k=K, update_rate=update_rate, normalize=True)
    router.reset_parameters(scale=1.0)
    return router.train()


def relu(factor: float = 1.5) -> ReluRouter:
    torch.manual_seed(0)
    term = ReluL1(0.01, "micro_batch", factor, K)
    router = ReluRouter(D, n_experts=E, top_k=K, max_active=E, balance=[term])
    router.reset_parameters(scale=1.0)
    return router.train()


class Model(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router


def test_biases_move_against_the_load() -> None:
    router = biased()
    routing = router(tokens(), None)
    counts = torch.bincount(routing.index.flatten(), minlength=E).float()
    steer_routers(Model(router), under("router", totals(routing.stats)))
    torch.testing.assert_close(router.selection_bias, 0.1 * (counts.mean() - counts).sign())


def test_biases_even_the_load_out() -> None:
    router, x = biased(update_rate=0.01), tokens(batch=16)

    def spread() -> Tensor:
        return torch.bincount(router(x, None).index.flatten(), minlength=E).float().std()

    before = spread()
    for _ in range(100):
        steer_routers(Model(router), under("router", totals(router(x, None).stats)))
    assert spread() < 0.25 * before


def test_micro_batches_add_up() -> None:
    whole, split = biased(), biased()
    x = tokens(batch=5)
    parts = pool(totals(split(x[:2], None).stats), totals(split(x[2:], None).stats))
    steer_routers(Model(whole), under("router", totals(whole(x, None).stats)))
    steer_routers(Model(split), under("router", parts))
    assert torch.equal(whole.selection_bias, split.selection_bias)
    assert whole.selection_bias.any()


def test_tokens_at_rest_are_no_load() -> None:
    router = biased()
    alive = torch.zeros(3, 8)
    alive[0] = 1.0
    load = router(tokens(), Alive(alive)).stats["load"]
    assert load.sum() == 8 * K
    assert load[1:].sum() == 0


def test_no_gradient_reaches_a_bias_and_checkpoints_hold_it() -> None:
    router = biased()
    assert "selection_bias" in router.state_dict()
    assert all(name != "selection_bias" for name, _ in router.named_parameters())
    assert not router.selection_bias.requires_grad


def test_a_forward_pass_leaves_the_buffers_alone() -> None:
    for router in (biased(), relu()):
        before = {name: buffer.clone() for name, buffer in router.named_buffers()}
        router(tokens(), None)
        assert all(torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())


@pytest.mark.parametrize(("shift", "exponent"), [(10.0, 1), (-10.0, -1)])
def test_the_coefficient_follows_the_number_of_active_experts(shift: float, exponent: int) -> None:
    router = relu(factor=1.5)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = shift
    x = tokens().abs()
    before = router.losses(router(x, None).stats)["relu_l1"]
    steer_routers(Model(router), under("router", totals(router(x, None).stats)))
    after = router.losses(router(x, None).stats)["relu_l1"]
    assert router.multiplier.item() == pytest.approx(1.5**exponent)
    torch.testing.assert_close(after, before * 1.5**exponent)


def test_the_coefficient_stays_where_the_target_is_met() -> None:
    router = relu()
    with torch.no_grad():
        router.weight.fill_(-1.0)
        router.weight[:K] = 1.0
    steer_routers(Model(router), under("router", totals(router(tokens().abs(), None).stats)))
    assert router.multiplier.item() == 1.0
