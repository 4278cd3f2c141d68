"""Layers that run several times under autocast: expert gradients formed once equal those added up call by call."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from moeut_compose.blocks.linear import joint_linear
from moeut_compose.blocks.mixers import SwitchHead
from moeut_compose.blocks.stages import Stage, skip_resting
from moeut_compose.build import build_model
from moeut_compose.spec.io import load_spec

SMALL = ["d_model=32", "vocab_size=60", "context_length=16"]
SMALL += [f"stages.0.layers.0.feedforward.{field}" for field in ("n_experts=6", "d_expert=8", "top_k=2")]
HALTING = [
    *SMALL,
    "stages.0.layers.0.mixer={kind: switch_head, n_heads: 2, d_head: 8, n_experts: 3, top_k: 2}",
    "stages.0.halting={kind: act}",
]


def gradients(model, monkeypatch=None):
    """Of one step under autocast, and how often one reached each parameter."""
    if monkeypatch is not None:
        monkeypatch.setattr(Stage, "_tickets", lambda self, x, copies: [iter(()) for _ in self.layers])
    arrivals = dict.fromkeys(dict(model.named_parameters()), 0)
    for name, parameter in model.named_parameters():
        parameter.grad = None

        def count(_, name=name):
            arrivals[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    ids = torch.randint(0, 60, (2, 17), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids[:, :-1], targets=ids[:, 1:])
        loss = out.cross_entropy + sum(out.losses.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, arrivals


@pytest.mark.parametrize("changes", [SMALL, HALTING], ids=["plain", "halting"])
def test_formed_once_or_added_up(monkeypatch, changes):
    torch.manual_seed(0)
    model = build_model(load_spec("moeut_tiny", changes), device=torch.device("cpu")).train()
    once, arrivals = gradients(model)
    assert set(arrivals.values()) == {1}
    added, _ = gradients(model, monkeypatch)
    for name, gradient in once.items():
        expert = name.endswith((".up", ".down", ".value", ".output"))
        assert (gradient - added[name]).norm() <= (3e-3 if expert else 0) * added[name].norm(), name


def test_nobody_waits_without_gradients_or_for_tokens_at_rest(monkeypatch):
    """Without gradients there is nothing to wait for; where tokens are skipped, calls have no fixed number of rows."""
    model = build_model(load_spec("moeut_tiny", HALTING), device=torch.device("cpu")).train()
    seen = []
    tickets = Stage._tickets

    def spy(self, x, copies):
        given = [list(of_member) for of_member in tickets(self, x, copies)]
        seen.append(sum(len(of_member) for of_member in given))
        return [iter(of_member) for of_member in given]

    monkeypatch.setattr(Stage, "_tickets", spy)
    ids = torch.randint(0, 60, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, targets=ids)
        with torch.no_grad():
            model(ids, targets=ids)
        skip_resting(model)
        model(ids, targets=ids)
    assert seen[0] > 0
    assert seen[1:] == [0, 0]


def test_joint_linear_equals_its_parts():
    x, weights = torch.randn(3, 5, 13), [torch.randn(n, 13, requires_grad=True) for n in (4, 1, 7)]
    together, alone = joint_linear(x, *weights), [linear(x, weight) for weight in weights]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected)
    expected = torch.autograd.grad(sum(part.sin().sum() for part in alone), weights)
    actual = torch.autograd.grad(sum(part.sin().sum() for part in together), weights)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_joint_products_change_nothing(monkeypatch):
    torch.manual_seed(0)
    model = build_model(load_spec("moeut_tiny", SMALL), device=torch.device("cpu")).train()
    ids = torch.randint(0, 60, (2, 16))
    together = model(ids, targets=ids).cross_entropy
    monkeypatch.setattr(SwitchHead, "_joint_products", lambda self, x: None)
    torch.testing.assert_close(together, model(ids, targets=ids).cross_entropy)


def test_joint_linear_of_no_tokens_and_of_odd_strided_ones() -> None:
    weights = [torch.randn(rows, 5, requires_grad=True) for rows in (3, 7)]
    empty = joint_linear(torch.zeros(2, 0, 5), *weights)
    assert [part.shape for part in empty] == [(2, 0, 3), (2, 0, 7)]
    gradients = torch.autograd.grad(sum(part.sum() for part in empty), weights)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    x = torch.randn(5, 4, 2).permute(2, 1, 0)
    columns = [weight.detach().t().contiguous().t() for weight in weights]
    for part, weight in zip(joint_linear(x, *columns), weights, strict=True):
        torch.testing.assert_close(part, linear(x.contiguous(), weight))
