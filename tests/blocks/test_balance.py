"""Balance terms against sums written out by hand, their scopes, and their independence of repeats."""

import math

import pytest
import torch
from torch import Tensor

from moeut_compose.blocks.balance import (
    Balance,
    CVSquared,
    Entropy,
    MutualInformation,
    MutualInformationAsCoded,
    Observation,
    ReluL1,
    Switch,
    ZLoss,
)
from moeut_compose.blocks.stats import pool

B, T, H, E, K = 2, 5, 2, 4, 2


def observation(seed: int = 0, alive: Tensor | None = None) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, H, E, dtype=torch.float64, generator=generator).requires_grad_()
    chosen, index = logits.topk(K, dim=-1)
    return Observation(logits, index, chosen.sigmoid(), alive)


def terms(scope: str) -> list[Balance]:
    plain = [Entropy, Switch, ZLoss, CVSquared, MutualInformation, MutualInformationAsCoded]
    return [*(term(1.0, scope) for term in plain), ReluL1(1.0, scope, 1.2, K)]


def entropy(p: Tensor) -> float:
    return -sum(q * math.log(q) for q in p.tolist() if q > 0)


def groups(scope: str) -> list[tuple[list[int], int]]:
    """The sets of sequences, each with one head, over which a term is taken before the mean."""
    batches = [[b] for b in range(B)] if scope == "sequence" else [list(range(B))]
    return [(batch, head) for batch in batches for head in range(H)]


def by_hand(name: str, seen: Observation, scope: str) -> float:
    values = []
    for batch, head in groups(scope):
        z = torch.cat([seen.logits[b, :, head] for b in batch]).detach()
        index = torch.cat([seen.index[b, :, head] for b in batch])
        gate = torch.cat([seen.gate[b, :, head] for b in batch]).detach()
        p = z.softmax(-1)
        n = len(z)
        usage = p.mean(0)
        load = torch.bincount(index.flatten(), minlength=E).double()
        conditional = sum(entropy(row) for row in p) / n
        match name:
            case "entropy":
                values.append(-entropy(usage))
            case "switch":
                values.append(E * sum(load[e] / (n * K) * usage[e] for e in range(E)).item())
            case "z_loss":
                values.append(sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in z.tolist()) / n)
            case "cv_squared":
                sums = torch.zeros(E, dtype=torch.float64).scatter_add(0, index.flatten(), gate.flatten())
                values.append((sums.std() / sums.mean()).item() ** 2)
            case "mutual_information":
                values.append(conditional - entropy(usage))
            case "mutual_information_as_coded":
                # without a mask the published weight of a token is 1 / (tokens x experts)
                values.append(conditional / E + entropy(usage / E))
            case "relu_l1":
                active = (z > 0).double().sum(0)
                score = z.clamp_min(0).mean(0)
                values.append(sum(active[e] * E / (K * n) * score[e] for e in range(E)).item())
    return sum(values) / len(values)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("place", range(7))
def test_terms_equal_their_formulas(scope: str, place: int) -> None:
    term = terms(scope)[place]
    seen = observation()
    assert term.loss(term.observe(seen)).item() == pytest.approx(by_hand(term.name, seen, scope), rel=1e-10)


@pytest.mark.parametrize("term", terms("micro_batch"), ids=lambda term: term.name)
def test_a_gradient_reaches_the_logits(term: Balance) -> None:
    seen = observation()
    term.loss(term.observe(seen)).backward()
    assert seen.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("place", range(7))
def test_three_equal_calls_give_the_term_of_one(scope: str, place: int) -> None:
    term = terms(scope)[place]
    once = term.observe(observation())
    thrice = pool(pool(once, term.observe(observation())), term.observe(observation()))
    torch.testing.assert_close(term.loss(thrice), term.loss(once), rtol=1e-12, atol=0)


def test_repeats_pool_distributions_before_the_formula() -> None:
    """Two calls that use one expert each look even together: the entropy of the mean, not the mean of two."""
    sharp = torch.full((1, 3, 1, 2), -50.0, dtype=torch.float64)
    first, second = sharp.clone(), sharp.clone()
    first[..., 0], second[..., 1] = 50.0, 50.0
    term = Entropy(1.0, "sequence")
    stats = [
        term.observe(Observation(z, z.argmax(-1, keepdim=True), torch.ones(1, 3, 1, 1), None))
        for z in (first, second)
    ]
    assert term.loss(stats[0]).item() == pytest.approx(0.0, abs=1e-12)
    assert term.loss(pool(*stats)).item() == pytest.approx(-math.log(2))


def test_scopes_differ_where_sequences_do() -> None:
    for per_sequence, over_batch in zip(terms("sequence"), terms("micro_batch"), strict=True):
        seen = observation()
        first = per_sequence.loss(per_sequence.observe(seen))
        second = over_batch.loss(over_batch.observe(seen))
        assert (first - second).abs() > 1e-6 or per_sequence.name == "z_loss"


def test_a_sequence_term_does_not_depend_on_the_rest_of_the_batch() -> None:
    for term in terms("sequence"):
        stats = term.observe(observation())
        alone = [term.loss({name: value[b : b + 1] for name, value in stats.items()}) for b in range(B)]
        torch.testing.assert_close(term.loss(stats), sum(alone) / B)


def test_even_routing_is_where_switch_is_one_and_entropy_is_least() -> None:
    logits = torch.zeros(1, E, 1, E, dtype=torch.float64)
    index = torch.arange(E).view(1, E, 1, 1)
    seen = Observation(logits, index, torch.ones(1, E, 1, 1, dtype=torch.float64), None)
    assert Switch(1.0, "sequence").loss(Switch(1.0, "sequence").observe(seen)).item() == pytest.approx(1.0)
    assert Entropy(1.0, "sequence").loss(Entropy(1.0, "sequence").observe(seen)).item() == pytest.approx(
        -math.log(E)
    )


def test_mutual_information_as_coded_has_the_wrong_sign_and_the_other_has_not() -> None:
    """Uniform routing carries no information: 0 is right, 2 log E is what was published (with halting)."""
    logits = torch.zeros(1, 8, 1, E, dtype=torch.float64)
    gate = torch.ones(1, 8, 1, 1, dtype=torch.float64)
    seen = Observation(logits, torch.zeros(1, 8, 1, 1).long(), gate, torch.ones(1, 8))
    right, coded = MutualInformation(1.0, "micro_batch"), MutualInformationAsCoded(1.0, "micro_batch")
    assert right.loss(right.observe(seen)).item() == pytest.approx(0.0, abs=1e-12)
    assert coded.loss(coded.observe(seen)).item() == pytest.approx(2 * math.log(E))


def test_tokens_at_rest_count_nowhere() -> None:
    alive = torch.ones(B, T, dtype=torch.float64)
    alive[:, 3:] = 0.0
    whole = observation(alive=alive)
    rests = (alive == 0)[:, :, None, None]
    masked = Observation(
        whole.logits.masked_fill(rests, 0.0),
        whole.index,
        whole.gate.masked_fill(rests, 0.0),
        alive,
    )
    short = Observation(*(part[:, :3] for part in (whole.logits, whole.index, whole.gate, alive)))
    for term in terms("sequence"):
        torch.testing.assert_close(term.loss(term.observe(masked)), term.loss(term.observe(short)))
