"""Every statistic against figures worked out by hand on a few tokens."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from moeut_compose.analyze.calls import RouterCalls, RouterName, router_calls
from moeut_compose.analyze.diversity import DiversitySums, effective_number
from moeut_compose.analyze.halting import N_BINS, HaltingSums
from moeut_compose.analyze.observe import Application, Choice
from moeut_compose.analyze.overlap import OverlapSums
from moeut_compose.analyze.pairs import CoOccurrence, PairSums
from moeut_compose.analyze.residual import ResidualSums
from moeut_compose.analyze.usage import UsageSums

CPU = torch.device("cpu")


def calls(
    sets: list[list[list[int]]], *, ids: list[int], n_experts: int, rests: list[list[int]] = ()
) -> RouterCalls:
    """One window and one head: `sets[repeat][token]` lists the experts, gated 0.5; `rests[repeat]` lists tokens."""
    gate = torch.zeros(len(sets), 1, len(ids), 1, n_experts)
    runs = torch.ones(len(sets), 1, len(ids), dtype=torch.bool)
    for repeat, tokens in enumerate(sets):
        for token, experts in enumerate(tokens):
            gate[repeat, 0, token, 0, experts] = 0.5
    for repeat, tokens in enumerate(rests):
        runs[repeat, 0, tokens] = False
    return RouterCalls(gate, gate.clone(), runs, torch.tensor([ids]), torch.arange(len(ids))[None])


def test_usage_by_hand() -> None:
    seen = calls([[[0], [0], [1], [0]]], ids=[0] * 4, n_experts=4)
    # logits ln 6, ln 2, ln 1, ln 1: probabilities 0.6, 0.2, 0.1, 0.1
    seen.logits[:] = torch.tensor([6.0, 2.0, 1.0, 1.0]).log()
    sums = UsageSums(1, 1, 4, CPU)
    sums.add(seen)
    sums.add(seen)
    usage = sums.result()
    assert_allclose(usage.tokens, [8])
    assert_allclose(usage.share, [[[0.75, 0.25, 0, 0]]])
    assert_allclose(usage.weight, [[[0.375, 0.125, 0, 0]]])
    assert_allclose(usage.load, [[[3, 1, 0, 0]]])
    assert_allclose(usage.max_over_mean, [3])
    assert_allclose(usage.dead, [2])
    assert_allclose(usage.usage_entropy, [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))])
    assert_allclose(usage.entropy, [-sum(p * math.log(p) for p in (0.6, 0.2, 0.1, 0.1))], rtol=1e-6)
    assert_allclose(usage.top1_over_median, [4.0], rtol=1e-6)  # 0.6 over the mean of 0.1 and 0.2


def test_usage_leaves_resting_tokens_out() -> None:
    seen = calls([[[0], [1]], [[0], [1]]], ids=[0, 0], n_experts=2, rests=[[], [1]])
    sums = UsageSums(2, 1, 2, CPU)
    sums.add(seen)
    usage = sums.result()
    assert_allclose(usage.tokens, [2, 1])
    assert_allclose(usage.share[:, 0], [[0.5, 0.5], [1, 0]])


def test_passes_that_no_token_comes_to_have_no_figures() -> None:
    seen = calls([[[0], [1]], [[0], [1]]], ids=[0, 0], n_experts=2, rests=[[], [0, 1]])
    sums = UsageSums(2, 1, 2, CPU)
    sums.add(seen)
    usage = sums.result()
    for figures in (
        usage.entropy,
        usage.usage_entropy,
        usage.top1_over_median,
        usage.max_over_mean,
        usage.dead,
    ):
        assert np.isfinite(figures[0])
        assert np.isnan(figures[1])
    assert not usage.share[1].any()
    x = torch.ones(1, 2, 3)
    residual_sums = ResidualSums(2, CPU)
    residual_sums.add(
        [application(x, 2 * x, torch.ones(1, 2)), application(x, x, torch.zeros(1, 2), repeat=1)]
    )
    residual, _ = residual_sums.result()
    assert_allclose(residual.update, [1, math.nan])
    assert_allclose(residual.rms_after, [2, math.nan])


def test_overlap_by_hand() -> None:
    sets = [
        [[0, 1], [0, 1], [2, 3], [2, 3]],
        [[0, 1], [1, 2], [0, 1], [2, 3]],
    ]
    sums = OverlapSums(2, 1, 4, CPU)
    sums.add(calls(sets, ids=[5, 6, 5, 7], n_experts=4))
    overlap = sums.result()
    between = (1 + 1 / 3 + 0 + 1) / 4
    assert_allclose(overlap.between, [[1, between], [between, 1]])
    # half a window apart: tokens 0 and 2, 1 and 3, and the other way round
    assert_allclose(np.diag(overlap.unrelated), [0, (1 + 1 / 3 + 1 + 1 / 3) / 4], rtol=1e-6)
    # the sets of token t in pass 1, and of token t - 2 in pass 2
    assert_allclose(overlap.unrelated[0, 1], (1 + 0 + 0 + 1 / 3) / 4, rtol=1e-6)
    assert_allclose(overlap.same_token, [0, 1])  # token 5 at places 0 and 2
    assert_allclose(overlap.fresh, [1 / 4])
    assert_allclose(overlap.path_diversity, (1 + 1.5 + 2 + 1) / 4)


def test_overlap_where_nothing_can_be_compared() -> None:
    sums = OverlapSums(2, 1, 2, CPU)
    sums.add(calls([[[0], [1]], [[0], [0]]], ids=[1, 2], n_experts=2, rests=[[], [0, 1]]))
    overlap = sums.result()
    assert_allclose(overlap.between, [[1, math.nan], [math.nan, math.nan]])
    assert np.isnan(overlap.same_token).all()
    assert np.isnan(overlap.fresh).all()
    assert overlap.path_diversity == 1


def test_tokens_of_experts_by_hand() -> None:
    # expert 0: token 7 three times and token 8 once; expert 1: token 8 once
    seen = calls([[[0], [0], [0], [0]], [[], [], [], [1]]], ids=[7, 7, 7, 8], n_experts=2)
    seen.gate[0, 0, :, 0, 0] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    sums = DiversitySums(1, 2, 10, CPU)
    sums.add(seen)
    first, second = sums.result().experts
    assert (first.uses, first.distinct, second.uses, second.distinct) == (4, 2, 1, 1)
    assert first.effective == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert second.effective == 1
    overall = {7: 3 / 5, 8: 2 / 5}
    divergence = 0.75 * math.log(0.75 / overall[7]) + 0.25 * math.log(0.25 / overall[8])
    assert first.specialisation == pytest.approx(divergence)
    assert [token.id for token in first.typical] == [7]
    assert first.typical[0].lift == pytest.approx(0.75 / 0.6)
    assert [(place.position, place.repeat) for place in first.places] == [(1, 0), (2, 0), (3, 0), (0, 0)]
    assert second.places[0].position == 3
    assert second.places[0].repeat == 1


def test_best_places_are_kept_over_batches() -> None:
    sums = DiversitySums(1, 1, 4, CPU)
    for start, gate in ((0, 0.2), (10, 0.9), (20, 0.5)):
        seen = calls([[[0]]], ids=[1], n_experts=1)
        seen.gate[:] = gate
        seen.positions[:] += start
        sums.add(seen)
    (expert,) = sums.result().experts
    assert [place.position for place in expert.places] == [10, 20, 0]


def test_effective_number() -> None:
    assert effective_number(np.array([0.25, 0.25, 0.25, 0.25, 0])) == pytest.approx(4)
    assert effective_number(np.array([])) == 0


def test_pairs_by_hand() -> None:
    # pass 1 uses {0, 1} twice, pass 2 uses {0, 2} and {1, 2}
    sums = PairSums(2, 1, 3, CPU)
    sums.add(calls([[[0, 1], [0, 1]], [[0, 2], [1, 2]]], ids=[0, 0], n_experts=3))
    pairs = sums.result()
    assert_allclose(pairs.counts[0], [[3, 2, 1], [2, 3, 1], [1, 1, 2]])
    # independent: in pass 1 p = (1, 1, 0) of 2 tokens, in pass 2 p = (1/2, 1/2, 1) of 2
    assert_allclose(pairs.expected[0, 0, 1], 2 * 1 + 2 * 0.25)
    assert_allclose(pairs.expected[0, 0, 2], 2 * 0.5)
    assert_allclose(pairs.lift[0, 0, 1], (2 + 1) / (2.5 + 1))
    assert np.isnan(pairs.lift[0, 1, 1])
    assert pairs.closest() == []  # nothing exceeds what is expected


def test_closest_pairs_and_teams_side_by_side() -> None:
    team = np.array([0, 1, 0, 1])
    counts = np.where(team[:, None] == team[None, :], 40.0, 2.0)[None]
    pairs = CoOccurrence(counts, np.full((1, 4, 4), 20.0))
    (first, second) = pairs.closest()
    assert {first.experts, second.experts} == {(0, 2), (1, 3)}
    assert first.lift == 2
    assert first.count == 40
    order = pairs.order()
    assert list(team[order]) in ([0, 0, 1, 1], [1, 1, 0, 0])


def application(
    before: torch.Tensor, after: torch.Tensor, mass: torch.Tensor, repeat: int = 0
) -> Application:
    one = Application(0, 0, repeat, before, mass)
    one.after, one.mixed, one.transformed = after, 0.5 * before, after - before
    return one


def test_residual_by_hand() -> None:
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])
    y = torch.tensor([[[3.0, 0.0], [0.0, 6.0], [0.0, 9.0]]])
    first = application(x, y, torch.tensor([[1.0, 0.2, 1.0]]))
    second = application(y, x, torch.tensor([[1.0, 0.3, 0.0]]), repeat=1)
    sums = ResidualSums(2, CPU)
    sums.add([first, second])
    residual, similarity = sums.result()
    root = math.sqrt(2)
    assert_allclose(residual.tokens, [3, 2])
    assert_allclose(residual.rms_before[1], (3 + 6) / 2 / root)
    assert_allclose(residual.rms_after[1], (5 + 2) / 2 / root)
    assert_allclose(residual.update[1], (4 / 3 + 4 / 6) / 2, rtol=1e-6)
    assert_allclose(residual.feedforward, residual.update)
    assert_allclose(residual.mixer, [0.5, 0.5])
    assert_allclose(residual.cosine[1], (3 / 5 + 1) / 2, rtol=1e-6)
    # the third token does not run in the second application
    assert_allclose(similarity.states[0, 1], (3 / 5 + 1) / 2, rtol=1e-6)
    assert_allclose(similarity.updates, [[1, -1], [-1, 1]], rtol=1e-6)


def test_halting_by_hand() -> None:
    masses = [[1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], [0.25, 0.0, 1.0, 0.0]]
    state = torch.zeros(1, 4, 1)
    passes = [application(state, state, torch.tensor([mass]), repeat) for repeat, mass in enumerate(masses)]
    sums = HaltingSums(3, 10, CPU)
    ids = torch.tensor([[1, 2, 1, 3]])
    for _ in range(3):
        sums.add(passes, ids, torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    depths = sums.result(n_words=1)
    assert depths.tokens == 12
    assert_allclose(depths.passes, [3, 3, 6])
    assert_allclose(depths.mass, [1, 0.5, 1.25 / 4])
    assert depths.mean == pytest.approx((1.75 + 1 + 3 + 1.5) / 4)
    assert_allclose(depths.loss, [2, 5, 2])
    expected = np.zeros(N_BINS)
    for depth in (1.75, 1.0, 3.0, 1.5):
        expected[min(int((depth - 1) / 2 * N_BINS), N_BINS - 1)] += 3
    assert_allclose(depths.expected, expected)
    # only token 1 occurs often enough: in 1.75 and 3 passes
    assert [(word.id, word.occurrences, word.expected) for word in depths.deep] == [(1, 6, (1.75 + 3) / 2)]
    assert depths.shallow == ()
    assert_allclose(depths.windows[0], [1.75, 1, 3, 1.5])
    assert depths.windows.shape == (3, 4)


def test_calls_are_ordered_by_repeat_and_single_experts_left_out() -> None:
    x = torch.zeros(1, 2, 4)
    runs = torch.ones(1, 2, dtype=torch.bool)
    applications = []
    for repeat in (1, 0):
        one = Application(0, 0, repeat, x, torch.ones(1, 2))
        gate = torch.full((1, 2, 1, 3), float(repeat))
        one.choices = {"ff": Choice(gate, gate, runs), "one": Choice(gate[..., :1], gate[..., :1], runs)}
        applications.append(one)
    found = router_calls(applications, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))
    assert set(found) == {RouterName(0, 0, "ff")}
    assert found[RouterName(0, 0, "ff")].gate[:, 0, 0, 0, 0].tolist() == [0.0, 1.0]
