"""The optimiser is AdamW on everything, and clipping is by the joint norm."""

import pytest
import torch
from torch import nn

from moeut_compose.spec.recipe import AdamWSpec
from moeut_compose.train import optim
from moeut_compose.train.optim import build_optimizer, clip_gradients


def test_one_group_holds_every_parameter_with_weight_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = build_optimizer(model, AdamWSpec(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5))
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.5)


def test_weight_decay_reaches_norms_and_biases() -> None:
    model = nn.LayerNorm(4)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros(4)
    build_optimizer(model, AdamWSpec(lr=0.1, weight_decay=0.5)).step()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.95))


@pytest.mark.parametrize(("bound", "expected"), [(10.0, 5.0), (1.0, 1.0), (None, 5.0)])
def test_clipping(bound: float | None, expected: float) -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], bound).item() == pytest.approx(5.0)
    assert torch.cat([a.grad, b.grad]).norm().item() == pytest.approx(expected, rel=1e-5)


def test_without_gradients_there_is_nothing_to_clip() -> None:
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0


def test_a_step_takes_parts_of_every_tensor_it_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may rename what our AdamW overrides; then sharded steps would be right and slow."""
    model = torch.nn.Linear(3, 2)
    model(torch.ones(3)).sum().backward()
    taken: list[torch.Size] = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(tensor.shape)
        return tensor

    monkeypatch.setattr(optim, "own_part", noted)
    build_optimizer(model, AdamWSpec()).step()
    weights_gradients_and_moments = 4
    assert taken.count(model.weight.shape) == weights_gradients_and_moments
    assert taken.count(model.bias.shape) == weights_gradients_and_moments
