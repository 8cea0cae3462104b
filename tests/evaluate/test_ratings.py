"""Ratings by the method card's numbers, by invariances, and intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import spearmanr

from diffalign import rng
from diffalign.errors import DataError
from diffalign.evaluate.ratings import (
    SCALE,
    KSort,
    Skill,
    Vote,
    bradley_terry,
    compare_scores,
    compare_votes,
    matchmake,
    mean_shift,
    variance_shift,
    win_fractions,
)

UNIT = KSort(mu=0.0, sigma=1.0, beta=1.0)


def duel(wins: int, losses: int, ties: int = 0) -> list[Vote]:
    ranks = [(1, 2)] * wins + [(2, 1)] * losses + [(1, 1)] * ties
    return [Vote(prompt=str(i), models=("a", "b"), ranks=r) for i, r in enumerate(ranks)]


def rated(votes, **options) -> dict[str, float]:
    return {row.model: row.rating for row in bradley_terry(compare_votes(votes), **options).rows}


def ranked(count: int, strengths: np.ndarray, seed: int = 0, k: int = 4, prompts: int = 100) -> list[Vote]:
    """count votes of a Plackett-Luce judge, whose pairs follow Bradley-Terry exactly."""
    random, votes = np.random.default_rng(seed), []
    for i in range(count):
        ids = random.choice(len(strengths), k, replace=False)
        order = np.argsort(np.argsort(-(strengths[ids] + random.gumbel(size=k)))) + 1
        votes.append(
            Vote(prompt=str(i % prompts), models=tuple(f"m{j:02}" for j in ids), ranks=tuple(order.tolist()), voter=str(i % 7))
        )
    return votes


# Bradley-Terry


def test_ties_count_half():
    """6 wins, 2 ties, 2 losses are 7:3, so the gap is 400 log10(7/3) = 147.1907 (evaluation.md section 9, 6)."""
    result = rated(duel(6, 2, 2), l2=1e-9)
    assert result["a"] - result["b"] == pytest.approx(147.1907, abs=1e-3)
    assert result["a"] + result["b"] == pytest.approx(2000)
    assert result == pytest.approx(rated(duel(7, 3), l2=1e-9))


@pytest.mark.parametrize(
    ("wins", "losses", "expected"), [(7, 3, (1059.8, 940.2)), (70, 30, (1071.9, 928.1)), (10, 0, (1184.8, 815.2))]
)
def test_prior_of_music_arena(wins, losses, expected):
    """L2 with C = 1 is l2 = 1; the card's section 4 ran that code on these records."""
    result = rated(duel(wins, losses), l2=1.0)
    assert (result["a"], result["b"]) == pytest.approx(expected, abs=0.05)


def test_default_prior_hardly_moves_a_record():
    """7 - 10 s(d) = 0.01 d/2 has its root at d = 0.84529, 146.84 points; without prior ln(7/3) = 0.84730, 147.19."""
    result = bradley_terry(compare_votes(duel(7, 3)), resamples=10)
    assert result.gap("a", "b")[0] == pytest.approx(146.84, abs=0.02) and result.l2 == 0.01


def test_separable_votes_are_flagged_and_finite():
    result = bradley_terry(compare_votes(duel(10, 0)), resamples=50)
    assert all(
        row.separable and math.isfinite(row.rating) and (row.low, row.high) == (-math.inf, math.inf) for row in result.rows
    )
    assert result.rows[0].model == "a" and result.gap("a", "b")[1:] == (-math.inf, math.inf)


def test_only_those_outside_the_largest_chain_are_flagged():
    """a, b, c beat each other in a ring; d beats them all; e was never seen."""
    pairs = [("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"), ("d", "b")] * 3
    votes = [Vote(prompt=str(i), models=pair, ranks=(1, 2)) for i, pair in enumerate(pairs)]
    result = bradley_terry(compare_votes(votes, models="abcde"), resamples=50)
    assert {row.model for row in result.rows if row.separable} == {"d", "e"}
    assert np.mean([result[m].rating for m in "abc"]) == pytest.approx(1000) and result["e"].meetings == 0
    assert all(math.isfinite(result[m].low) for m in "abc")


def test_a_chain_through_ties_bounds_a_model():
    """Ford's condition with ties as half wins: a tie leads both ways, so nobody is flagged."""
    assert not any(row.separable for row in bradley_terry(compare_votes(duel(5, 0, 1)), resamples=20).rows)


def test_known_strengths_are_found():
    """5,000 Plackett-Luce rankings of 4 among 8: within 0.08 nats of the truth."""
    strengths = np.linspace(-1.5, 1.5, 8)
    result = rated(ranked(5000, strengths), resamples=10)
    found = np.asarray([result[f"m{i:02}"] - 1000 for i in range(8)]) / SCALE
    assert np.abs(found - strengths).max() < 0.08


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_order_of_votes_and_of_models_is_nothing(seed):
    votes = ranked(40, np.linspace(-1, 1, 5), seed)
    shuffled = [votes[i] for i in np.random.default_rng(seed).permutation(len(votes))]
    turned = [Vote(prompt=v.prompt, models=v.models[::-1], ranks=v.ranks[::-1]) for v in shuffled]
    one, two = (bradley_terry(compare_votes(v), resamples=20, seed=1) for v in (votes, turned))
    for row in one.rows:
        other = two[row.model]
        assert (row.rating, row.low, row.high) == pytest.approx((other.rating, other.low, other.high), abs=1e-6)


def test_reversed_ranks_mirror_the_ratings():
    votes = ranked(60, np.linspace(-1, 1, 5), 3)
    mirrored = [Vote(prompt=v.prompt, models=v.models, ranks=tuple(5 - r for r in v.ranks)) for v in votes]
    one, two = rated(votes, resamples=10), rated(mirrored, resamples=10)
    assert {m: 2000 - r for m, r in two.items()} == pytest.approx(one, abs=1e-6)


def test_anchor_holds_and_gaps_stay():
    votes = ranked(200, np.linspace(-1, 1, 5))
    free, held = (bradley_terry(compare_votes(votes), anchor=a, resamples=100) for a in (None, "m00"))
    assert (held["m00"].rating, held["m00"].low, held["m00"].high) == (1000, 1000, 1000)
    assert held.gap("m03", "m01") == pytest.approx(free.gap("m03", "m01"), abs=1e-6)


def test_interval_of_a_large_sample_is_the_normal_one():
    """1200:800 in 2000 prompts: variance of the log-odds 1/1200 + 1/800, sd 0.0456 nats; 1.96 sd = 15.54 points."""
    value, low, high = bradley_terry(compare_votes(duel(1200, 800)), resamples=2000).gap("a", "b")
    assert value == pytest.approx(400 * math.log10(1.5), abs=0.01)
    assert (value - low, high - value) == pytest.approx((15.54, 15.54), abs=1.2)


def test_resamples_are_the_fits_scipy_would_make():
    """The batched Newton against one call of ``bradley_terry`` on the drawn clusters themselves."""
    votes = ranked(30, np.linspace(-1, 1, 5), 2, prompts=10)
    comparisons = compare_votes(votes)
    result = bradley_terry(comparisons, resamples=3, seed=5)
    times = rng.generator(5, "bootstrap").multinomial(10, np.full(10, 0.1), size=3)
    names = sorted({v.prompt for v in votes})
    for drawn, sample in zip(times, result.samples):
        again = [v for v in votes for _ in range(drawn[names.index(v.prompt)])]
        fit = rated(again, resamples=1)
        assert np.asarray([fit[m] for m in comparisons.models]) - np.mean(list(fit.values())) == pytest.approx(
            sample - sample.mean(), abs=1e-3
        )


def test_one_cluster_has_no_interval():
    votes = [Vote(prompt="same", models=("a", "b"), ranks=r) for r in ((1, 2), (2, 1))]
    row = bradley_terry(compare_votes(votes)).rows[0]
    assert math.isnan(row.low) and math.isnan(row.high) and not row.separable


def test_bad_options():
    comparisons = compare_votes(duel(1, 1))
    for options in ({"l2": 0.0}, {"l2": math.nan}, {"anchor": "z"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            bradley_terry(comparisons, **options)
    for models, ranks in (
        (("a",), (1,)),
        (("a", "a"), (1, 2)),
        (("a", "b"), (1,)),
        (("a", "b"), (0, 1)),
        (("a", "b"), (1.5, 2)),
    ):
        with pytest.raises(DataError):
            Vote(prompt="p", models=models, ranks=ranks)
    with pytest.raises(DataError, match="not among the entrants"):
        compare_votes(duel(1, 1), models=["a"])
    assert bradley_terry(compare_votes([], models=["a", "b"])).rows[0].rating == 1000
    assert bradley_terry(compare_votes([])).rows == ()


# Coverage of the interval. A prompt has a taste for some models, so its votes resemble each other.

STRENGTHS, TASTE = np.asarray([0.35, -0.35]), 1.0


def true_gap() -> float:
    """Points: the log-odds of the mean over prompts of P(first beats second), by quadrature over the taste."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    share = expit(np.ptp(STRENGTHS) + TASTE * math.sqrt(2) * nodes) @ weights / weights.sum()
    return SCALE * math.log(share / (1 - share))


def coverage(experiments: int, *, per_vote: bool = False, resamples: int = 500) -> float:
    """Share of experiments with 60 prompts of 3 votes whose interval holds the true gap."""
    random, inside, truth = np.random.default_rng(5), 0, true_gap()
    for experiment in range(experiments):
        scores = STRENGTHS[:, None, None] + TASTE * random.normal(size=(2, 60, 1)) + random.gumbel(size=(2, 60, 3))
        if per_vote:
            scores = scores.reshape(2, 180, 1)
        _, low, high = bradley_terry(compare_scores(scores, ["a", "b"]), resamples=resamples, seed=experiment).gap("a", "b")
        inside += low <= truth <= high
    return inside / experiments


def test_interval_covers_the_truth():
    """600 experiments: the standard error is 0.9 %."""
    assert 0.93 <= coverage(600, resamples=300) <= 0.97


@pytest.mark.slow
def test_interval_covers_the_truth_in_2000_experiments():
    assert 0.93 <= coverage(2000, resamples=1000) <= 0.97


def test_resampling_votes_would_not_cover():
    """The mutant: votes of one prompt taken as independent. Its interval is too narrow."""
    assert coverage(200, per_vote=True, resamples=200) < 0.92


# Scores of a reward


def test_scores_become_pairs():
    """Prompt 1: a > b on both seeds; prompt 2: a tie and one not scored. a has 2 wins, 1 tie of 3 meetings."""
    scores = np.asarray([[[2.0, 3.0], [1.0, np.nan]], [[1.0, 1.0], [1.0 + 1e-9, 5.0]]])
    comparisons = compare_scores(scores, ["a", "b"])
    assert comparisons.clusters == 2
    assert comparisons.total().tolist() == [[0, 2.5], [0.5, 0]]
    assert win_fractions(comparisons)[0, 1] == pytest.approx(2 / 3) and win_fractions(comparisons)[1, 0] == 0
    with pytest.raises(ValueError, match="models, prompts, seeds"):
        compare_scores(np.zeros((2, 3)), ["a", "b"])


def test_scores_and_votes_of_the_same_order_agree():
    random = np.random.default_rng(0)
    scores = random.normal(size=(4, 30, 1)) + np.arange(4)[:, None, None] / 2
    votes = [
        Vote(prompt=f"{p:02}", models=tuple("abcd"), ranks=tuple((np.argsort(np.argsort(-scores[:, p, 0])) + 1).tolist()))
        for p in range(30)
    ]
    one, two = bradley_terry(compare_scores(scores, "abcd"), seed=2), bradley_terry(compare_votes(votes), seed=2)
    for row in one.rows:
        assert (row.rating, row.low, row.high) == pytest.approx(
            (two[row.model].rating, two[row.model].low, two[row.model].high), abs=1e-6
        )


def test_win_fractions_keep_ties_in_the_denominator():
    """5 wins, 3 ties, 2 losses: 0.5 and 0.2, which add up to 1 - 0.3; all-bad votes are no meeting."""
    votes = [*duel(5, 2, 3), Vote(prompt="x", models=("a", "b"), ranks=None), Vote(prompt="y", models=("c", "b"), ranks=None)]
    table = win_fractions(compare_votes(votes, models="abc"))
    assert table[0, 1] == 0.5 and table[1, 0] == 0.2
    assert np.isnan(table[0, 0]) and np.isnan(table[2]).all()


# K-sort


def test_shifts_by_the_card():
    assert mean_shift(np.asarray([0, 0.5, -0.5])) == pytest.approx([0.797885, 0.509160, 1.141078], abs=1e-6)
    assert variance_shift(0.0) == pytest.approx(0.636620, abs=1e-6)
    extreme = np.asarray([-1e8, -1e3, -40, 40, 1e8])
    assert np.isfinite(mean_shift(extreme)).all() and ((variance_shift(extreme) >= 0) & (variance_shift(extreme) <= 1)).all()


def test_two_and_four_players():
    two = UNIT.update([UNIT.new] * 2, [1, 2])
    assert [s.mu for s in two] == pytest.approx([0.398942, -0.398942], abs=1e-6)
    assert [s.sigma**2 for s in two] == pytest.approx([0.840845] * 2, abs=1e-6)
    four = UNIT.update([UNIT.new] * 4, [1, 2, 3, 4])
    assert [s.mu for s in four] == pytest.approx([1.196827, 0.398942, -0.398942, -1.196827], abs=1e-6)
    assert [s.sigma**2 for s in four] == pytest.approx([0.522535] * 4, abs=1e-6)


def test_upsets_move_more():
    start = [Skill(mu=1.0, sigma=1.0), Skill(mu=0.0, sigma=1.0)]
    expected, upset = UNIT.update(start, [1, 2]), UNIT.update(start, [2, 1])
    assert [s.mu for s in expected] == pytest.approx([1.254580, -0.254580], abs=1e-6)
    assert [s.mu for s in upset] == pytest.approx([0.429461, 0.570539], abs=1e-6)
    assert [expected[0].sigma ** 2, upset[0].sigma ** 2] == pytest.approx([0.871544, 0.817120], abs=1e-6)


def test_start_values_of_the_leaderboard():
    board = KSort()
    one = board.update([board.new] * 2, [1, 2])
    assert [one[0].mu, one[1].mu, one[0].sigma] == pytest.approx([29.205221, 20.794779, 7.194481], abs=1e-6)
    four = board.update([board.new] * 4, [1, 2, 3, 4])
    assert [s.mu for s in four] == pytest.approx([37.6157, 29.2052, 20.7948, 12.3843], abs=1e-4)
    assert four[0].sigma == pytest.approx(4.048802, abs=1e-6)
    assert [board.score(s) for s in four] == pytest.approx([25.4693, 17.0588, 8.6484, 0.2379], abs=1e-4)


@pytest.mark.parametrize(
    ("k", "variance"), [(2, 51.7606), (3, 34.0767), (4, 16.3928), (5, 1e-4 * 625 / 9), (9, 1e-4 * 625 / 9)]
)
def test_variance_by_the_number_of_pictures(k, variance):
    """The printed sum is -1.2911 at K = 5: clamped at 1e-4 of the old 69.4444."""
    after = KSort().update([KSort().new] * k, range(1, k + 1))
    assert [s.sigma**2 for s in after] == pytest.approx([variance] * k, abs=1e-4)


def test_large_ballots_with_bounded_weight_stay_sound():
    """Nine pictures with three full pairs lose the variance of four: each of 8 pairs counts 3/8."""
    board = KSort(full_pairs=3)
    assert board.update([board.new] * 9, range(1, 10))[4].sigma == pytest.approx(4.048802, abs=1e-6)
    assert board.update([board.new] * 4, [1, 2, 3, 4]) == KSort().update([KSort().new] * 4, [1, 2, 3, 4])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(1e-6, 1e4), st.integers(1, 9)), min_size=2, max_size=9))
def test_update_is_always_finite(players):
    after = KSort().update([Skill(mu=m, sigma=s) for m, s, _ in players], [r for *_, r in players])
    for new, (_, sigma, _) in zip(after, players):
        assert math.isfinite(new.mu) and 0 < new.sigma <= sigma * (1 + 1e-9) and new.sigma >= 0.0099 * sigma


def test_ties_pull_together_and_inform():
    level = UNIT.update([UNIT.new] * 2, [1, 1])
    assert [s.mu for s in level] == [0, 0] and level[0].sigma ** 2 == pytest.approx(0.840845, abs=1e-6)
    apart = UNIT.update([Skill(mu=1.0, sigma=1.0), Skill(mu=0.0, sigma=1.0)], [2, 2])
    assert apart[0].mu == pytest.approx((1.254580 + 0.429461) / 2, abs=1e-6) and apart[0].mu < 1 and apart[1].mu > 0


def test_skills_after_votes():
    votes = [*duel(3, 1), Vote(prompt="x", models=("a", "b"), ranks=None)]
    skills = KSort()(votes, ["a", "b", "c"])
    assert skills["c"] == KSort().new and skills["a"].mu > 25 > skills["b"].mu and skills["a"].meetings == 4


# Matchmaking


def test_pivot_is_the_least_compared_and_meets_its_like():
    """n = 24 pairs. From model 3 (never met: all first), with none unmet the score -|dS| + sqrt(ln 24 / n) decides."""
    met = np.full((5, 5), 3.0) - 3 * np.eye(5)
    met[3, :] = met[:, 3] = [1, 1, 1, 0, 1]
    scores = np.asarray([0.0, 10.0, 11.0, 12.0, 30.0])
    assert matchmake(scores, met, 3, np.random.default_rng(0)) == [3, 2, 1]
    met[3, 4] = met[4, 3] = 0
    assert matchmake(scores, met, 3, np.random.default_rng(0)) == [3, 4, 2]  # never met comes before near
    assert matchmake(scores, met, 3, np.random.default_rng(0), alpha=0.0) == [3, 2, 1]
    assert matchmake(scores, met, 2, np.random.default_rng(0), pivot=0) == [0, 1]


def test_rarity_outweighs_a_small_distance():
    """ln(n) = 4.2: met twice gives 1.45, met 40 times 0.32; the difference of 1.13 beats a distance of 1."""
    met = np.zeros((3, 3))
    met[0, 1] = met[1, 0] = 40
    met[0, 2] = met[2, 0] = 2
    met[1, 2] = met[2, 1] = 25
    assert matchmake(np.asarray([0.0, 0.0, 1.0]), met, 2, np.random.default_rng(0), pivot=0) == [0, 2]
    assert matchmake(np.asarray([0.0, 0.0, 1.5]), met, 2, np.random.default_rng(0), pivot=0) == [0, 1]
    with pytest.raises(ValueError, match="k must be"):
        matchmake(np.zeros(3), met, 4, np.random.default_rng(0))


def arena(seed: int, matched: bool, *, models: int = 20, votes: int = 200) -> int:
    """Votes until the order of 20 models, 5 % of the votes noise, first correlates 0.95 with the truth."""
    random, board = np.random.default_rng(seed), KSort()
    truth = random.permutation(np.linspace(-3.5, 3.5, models))
    skills, met = [board.new] * models, np.zeros((models, models))
    for vote in range(votes):
        ids = (
            matchmake(np.asarray([board.score(s) for s in skills]), met, 4, random)
            if matched
            else random.choice(models, 4, replace=False).tolist()
        )
        order = np.argsort(np.argsort(-(truth[ids] + random.normal(size=4)))) + 1
        if random.random() < 0.05:
            order = random.permutation(order)
        for i, skill in zip(ids, board.update([skills[i] for i in ids], order)):
            skills[i] = skill
        met[np.ix_(ids, ids)] += 1 - np.eye(4)
        if spearmanr([s.mu for s in skills], truth)[0] >= 0.95:
            return vote + 1
    return votes


def test_matchmaking_converges_faster_than_chance():
    matched, chance = ([arena(seed, flag) for seed in range(8)] for flag in (True, False))
    assert np.mean(matched) < 0.6 * np.mean(chance)
