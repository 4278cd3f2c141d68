"""Gradients that wait for all uses of a weight: the sum of what the uses would have given, once."""

from __future__ import annotations

import moeut_kernels as mk
import pytest
import torch

ACTIVATIONS = ["relu", "swiglu"]


def make_uses(n_uses: int, activation: str = "relu"):
    """Weights of 5 experts, 6 -> 4 -> 6, and for each use rows, gates and a plan of 9 tokens with two choices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    w_up = normal(5, 6, 8 if activation == "swiglu" else 4).requires_grad_()
    w_down = normal(5, 4, 6).requires_grad_()
    uses = []
    for _ in range(n_uses):
        index = torch.rand(9, 1, 5, generator=generator).topk(2, -1)[1]
        uses.append((normal(9, 6).requires_grad_(), index, normal(9, 1, 2).requires_grad_()))
    return w_up, w_down, uses


def use(x, w_up, w_down, index, gate, ticket, activation="relu"):
    return mk.expert_feedforward(
        x, w_up, w_down, mk.plan(index, 5), gate, activation=activation, tickets=ticket
    )


def run(w_up, w_down, uses, tickets, activation="relu", apply=use):
    outs = [
        apply(x, w_up, w_down, index, gate, ticket, activation)
        for (x, index, gate), ticket in zip(uses, tickets, strict=True)
    ]
    return sum(out.sin().sum() for out in outs)


def tickets_for(w_up, w_down, n_uses):
    return mk.feedforward_tickets(w_up, w_down, n_uses, casts=(w_up, w_down), n_tokens=9, top_k=2)


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_uses", [1, 3])
def test_equals_the_sum_of_the_uses(cases, n_uses, activation, backend):
    w_up, w_down, uses = make_uses(n_uses, activation)
    leaves = [w_up, w_down, *(leaf for x, _, gate in uses for leaf in (x, gate))]
    with mk.use_backend(backend):
        expected = torch.autograd.grad(run(w_up, w_down, uses, [None] * n_uses, activation), leaves)
        loss = run(w_up, w_down, uses, tickets_for(w_up, w_down, n_uses), activation)
        actual = torch.autograd.grad(loss, leaves)
    assert all(cases.error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


def test_reaches_a_weight_once():
    w_up, w_down, uses = make_uses(3)
    arrived = []
    for weight in (w_up, w_down):
        weight.register_post_accumulate_grad_hook(arrived.append)
    run(w_up, w_down, uses, tickets_for(w_up, w_down, 3)).backward()
    assert [id(weight) for weight in arrived].count(id(w_up)) == 1
    assert [id(weight) for weight in arrived].count(id(w_down)) == 1


def test_a_use_that_the_loss_does_not_read(cases):
    w_up, w_down, uses = make_uses(3)
    expected = torch.autograd.grad(run(w_up, w_down, uses[:2], [None] * 2), (w_up, w_down))
    tickets = tickets_for(w_up, w_down, 3)
    loss = run(w_up, w_down, uses[:2], tickets[:2])
    use(uses[2][0], w_up, w_down, uses[2][1], uses[2][2], tickets[2])
    actual = torch.autograd.grad(loss, (w_up, w_down))
    assert all(cases.error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


def test_frozen_weights_ask_for_nothing():
    w_up, w_down, uses = make_uses(2)
    for weight in (w_up, w_down):
        weight.requires_grad_(False)
    run(w_up, w_down, uses, tickets_for(w_up, w_down, 2)).backward()
    assert w_up.grad is None
    assert uses[0][0].grad is not None


def test_placeholders_take_no_memory():
    w_up, w_down, _ = make_uses(1)
    parts = [part for pair in tickets_for(w_up, w_down, 4) for ticket in pair for part in ticket]
    assert all(part.untyped_storage().nbytes() <= 4 for part in parts)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiles_to_one_graph(cases):
    w_up, w_down, uses = make_uses(3)
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    results = []
    for apply in (use, compiled):
        loss = run(w_up, w_down, uses, tickets_for(w_up, w_down, 3), apply=apply)
        results.append(torch.autograd.grad(loss, (w_up, w_down, uses[0][0])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_uses_without_tokens_add_nothing():
    w_up, w_down, _ = make_uses(1)
    empty = (torch.zeros(0, 6), torch.zeros(0, 1, 2, dtype=torch.int64), torch.zeros(0, 1, 2))
    tickets = mk.feedforward_tickets(w_up, w_down, 1, casts=(w_up, w_down), n_tokens=0, top_k=2)
    gradients = torch.autograd.grad(run(w_up, w_down, [empty], tickets), (w_up, w_down))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
def test_rows_and_weights_that_are_not_contiguous(cases, backend):
    w_up, w_down, uses = make_uses(2)
    columns = [w.detach().mT.contiguous().mT.requires_grad_() for w in (w_up, w_down)]
    strided = [(x.repeat_interleave(2, 1)[:, ::2], index.mT.contiguous().mT, gate.repeat(1, 1, 2)[..., :2])
               for x, index, gate in uses]  # fmt: skip
    leaves = [leaf for x, _, gate in uses for leaf in (x, gate)]
    with mk.use_backend(backend):
        expected = torch.autograd.grad(run(w_up, w_down, uses, [None] * 2), [w_up, w_down, *leaves])
        loss = run(*columns, strided, tickets_for(*columns, 2))
        actual = torch.autograd.grad(loss, [*columns, *leaves])
    assert all(cases.error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
def test_padded_copies_give_gradients_of_the_odd_widths(cases, backend):
    w_up, w_down, uses = make_uses(2)
    casts = mk.cast_weights(w_up, w_down, dtype=torch.bfloat16, padded=True)
    assert casts[0].shape == (5, 16, 16)
    tickets = mk.feedforward_tickets(w_up, w_down, 2, casts=casts, n_tokens=9, top_k=2)

    def apply(x, w_up, w_down, index, gate, ticket, activation):
        plan = mk.plan(index, 5)
        return mk.expert_feedforward(x.bfloat16(), w_up, w_down, plan, gate, casts=casts, tickets=ticket)

    with mk.use_backend(backend):
        expected = torch.autograd.grad(run(w_up, w_down, uses, [None] * 2, apply=apply), (w_up, w_down))
        actual = torch.autograd.grad(run(w_up, w_down, uses, tickets, apply=apply), (w_up, w_down))
    assert [g.shape for g in actual] == [w_up.shape, w_down.shape]
    assert all(cases.error(a, b) < 1e-2 for a, b in zip(actual, expected, strict=True))


def make_projection(merge: bool):
    """A projection by 12 experts, 3 groups with 4 of their own, and three uses of 9 tokens with two choices each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, *((4, 6) if merge else (6, 4)), generator=generator).requires_grad_()
    uses = []
    for _ in range(3):
        index = torch.rand(9, 3, 4, generator=generator).topk(2, -1)[1] + 4 * torch.arange(3)[:, None]
        x = torch.randn(9, *((3, 4) if merge else (6,)), generator=generator).requires_grad_()
        uses.append((x, index, torch.randn(9, 3, 2, generator=generator).requires_grad_()))
    return weight, uses


def project(merge: bool, weight, uses, tickets, gated=True):
    op, total = mk.expert_merge if merge else mk.expert_split, 0.0
    for (x, index, gate), ticket in zip(uses, tickets, strict=True):
        plan = mk.plan(index, 12, disjoint=True)
        total = total + op(x, weight, plan, gate if gated else None, ticket=ticket).sin().sum()
    return total


def projection_tickets(merge: bool, weight):
    return mk.projection_tickets(weight, 3, merge=merge, cast=weight, n_tokens=9, n_groups=3, top_k=2)


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", "bmm"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("merge", [False, True])
def test_projections_equal_the_sum_of_the_uses(cases, merge, gated, backend):
    weight, uses = make_projection(merge)
    leaves = [weight, *(leaf for x, _, gate in uses for leaf in ((x, gate) if gated else (x,)))]
    with mk.use_backend(backend):
        expected = torch.autograd.grad(project(merge, weight, uses, [None] * 3, gated), leaves)
        tickets = projection_tickets(merge, weight)
        actual = torch.autograd.grad(project(merge, weight, uses, tickets, gated), leaves)
    bound = 5e-6 if backend == "bmm" else 1e-6  # bmm: without tickets every expert multiplies every row
    assert all(cases.error(a, b) < bound for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("merge", [False, True])
def test_gradients_of_projections_reach_a_weight_once(merge):
    weight, uses = make_projection(merge)
    arrived = []
    weight.register_post_accumulate_grad_hook(arrived.append)
    project(merge, weight, uses, projection_tickets(merge, weight)).backward()
    assert len(arrived) == 1


@pytest.mark.parametrize("merge", [False, True])
def test_projections_from_padded_copies(cases, merge):
    weight, uses = make_projection(merge)
    uses = [(x.detach().bfloat16(), index, gate) for x, index, gate in uses]
    (cast,) = mk.cast_weights(weight, dtype=torch.bfloat16, padded=True)
    tickets = mk.projection_tickets(weight, 3, merge=merge, cast=cast, n_tokens=9, n_groups=3, top_k=2)
    op = mk.expert_merge if merge else mk.expert_split

    def gradient(tickets):
        outs = [
            op(x, weight, mk.plan(index, 12, disjoint=True), gate, cast=cast, ticket=ticket)
            for (x, index, gate), ticket in zip(uses, tickets, strict=True)
        ]
        return torch.autograd.grad(sum(out.float().sin().sum() for out in outs), weight)[0]

    actual, expected = gradient(tickets), gradient([None] * 3)
    assert actual.shape == weight.shape
    assert cases.error(actual, expected) < 1e-2
