"""Win rates by hand, intervals by simulation, sentences by eye."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from diffalign.evaluate import statistics
from diffalign.evaluate.sides import implicit_accuracy
from diffalign.evaluate.statistics import bootstrap, holm, outcomes, paired, prompts_needed, sweep, wilson

NAN = float("nan")


def column(*values) -> np.ndarray:
    return np.asarray(values, float)[:, None]


def test_win_rate_with_ties_by_hand():
    """4 wins, 3 ties, 1 loss over 8 prompts: (4 + 3/2)/8 = 0.6875; sign test of 4 against 1: 2 * (5 + 1)/32 = 0.375."""
    base = column(0, 0, 0, 0, 1, 1, 1, 1)
    aligned = column(1, 1, 1, 1, 1, 1, 1, 0)
    result = paired(base, aligned)
    assert (result.wins, result.ties, result.losses, result.pairs, result.prompts) == (4, 3, 1, 8, 8)
    assert result.win_rate == 0.6875 and result.sign_test == pytest.approx(0.375)
    assert (result.base_score, result.aligned_score, result.difference) == (0.5, 0.875, 0.375)


def test_seeds_are_averaged_inside_a_prompt():
    """Prompt 1: win, win, loss, tie = 2.5/4; prompt 2: ties = 0.5. Mean 0.5625. The prompt is the unit, not the picture."""
    base, aligned = np.zeros((2, 4)), np.asarray([[1.0, 1, -1, 0], [0, 0, 0, 0]])
    result = paired(base, aligned)
    assert result.win_rate == 0.5625 and (result.wins, result.ties, result.losses) == (2, 5, 1)
    assert result.sign_test == 1.0  # one prompt won, none lost: 2 * 1/2


def test_unscored_pictures_leave_as_pairs():
    """Prompt 1 loses its second seed, prompt 2 all: one prompt, one win is left; base's 5 never enters a mean."""
    result = paired(np.asarray([[0.0, NAN], [5.0, NAN]]), np.asarray([[1.0, 9.0], [NAN, NAN]]))
    assert (result.prompts, result.pairs, result.unscored) == (1, 1, 3)
    assert (result.win_rate, result.base_score, result.aligned_score) == (1.0, 0.0, 1.0)
    assert paired(column(NAN), column(1.0)) is None


def test_equal_up_to_rounding_is_a_tie():
    assert outcomes(np.asarray([1.0, 1.0, 1e6, NAN]), np.asarray([1 + 1e-9, 1.001, 1e6 + 0.5, 1.0])).tolist()[:3] == [
        0.5,
        1,
        0.5,
    ]


def test_swapping_sides_mirrors_everything():
    random = np.random.default_rng(0)
    base, aligned = random.integers(0, 4, (2, 60, 2)) / 4
    one, two = paired(base, aligned, seed=3), paired(aligned, base, seed=3)
    assert one.win_rate == pytest.approx(1 - two.win_rate) and one.wins == two.losses
    assert one.win_rate_low == pytest.approx(1 - two.win_rate_high, abs=1e-12)
    assert one.difference_low == pytest.approx(-two.difference_high, abs=1e-12) and one.sign_test == two.sign_test


def test_interval_is_a_function_of_the_seed():
    random = np.random.default_rng(1)
    base, aligned = random.normal(size=(2, 50, 1))
    assert paired(base, aligned, seed=1) == paired(base, aligned, seed=1) != paired(base, aligned, seed=2)


def test_coverage_with_ties():
    """400 experiments, 100 prompts, 30 % wins, 30 % ties, 40 % losses: truth 0.45; 95 % +- 3 errors of 1.1 %."""
    random, inside = np.random.default_rng(7), 0
    for experiment in range(400):
        aligned = random.choice([1.0, 0.0, -1.0], p=[0.3, 0.3, 0.4], size=(100, 1))
        result = paired(np.zeros((100, 1)), aligned, seed=experiment, resamples=1000)
        inside += result.win_rate_low <= 0.45 <= result.win_rate_high
    assert 0.92 <= inside / 400 <= 0.98


def test_false_alarms_on_identical_models():
    """No difference, small sample, two-seed prompts: either verdict must stay near 5 %, also with 20 prompts."""
    random = np.random.default_rng(8)
    verdicts = [paired(*random.normal(size=(2, 20, 2)), seed=i, resamples=500).verdict for i in range(400)]
    assert 1 - verdicts.count("undecided") / 400 < 0.08


def test_interval_matches_the_normal_one_when_large():
    """n = 2000 of 0/1 with mean 0.6: sd 0.4899, 1.96 * 0.4899/sqrt(2000) = 0.0215."""
    rows = np.asarray([[1.0] * 1200 + [0.0] * 800])
    ((low, high),) = bootstrap(rows, seed=0, resamples=10_000)
    assert low == pytest.approx(0.6 - 0.0215, abs=1.5e-3) and high == pytest.approx(0.6 + 0.0215, abs=1.5e-3)


def test_unanimous_prompts_are_not_certainty():
    """3 of 3 wins: resampling would give [1, 1] and "better"; Wilson says [3/(3 + 1.96^2), 1] = [0.4385, 1]."""
    result = paired(column(0, 0, 0), column(1, 1, 1))
    assert result.win_rate_low == pytest.approx(0.4385, abs=1e-4)
    assert (result.win_rate_high, result.verdict) == (1.0, "undecided")


def test_unanimous_pairs_are_not_certainty():
    """8 of 8 pairs gained: Wilson's [8/(8 + 1.96^2), 1] = [0.6756, 1], where resampling would give [1, 1]."""
    found = implicit_accuracy(np.zeros((8, 2)), [np.ones((8, 2))])
    assert found == pytest.approx((1.0, 0.6756, 1.0), abs=1e-4)


def test_ties_cannot_decide():
    """4 wins, 196 ties: the bootstrap's lower end is above one half (no win at all in e^-4 = 1.8 % of resamples), but by
    chance all four fall on one side in 2/2^4 = 12.5 % of cases. Six to none is 3 %."""
    result = paired(np.zeros((200, 1)), column(*[1] * 4, *[0] * 196))
    assert result.win_rate_low > 0.5 and result.sign_test == 0.125 and result.verdict == "undecided"
    assert result.sentence.endswith("Fewer than 6 prompts were won or lost, the others are ties: too few to tell.")
    assert paired(np.zeros((200, 1)), column(*[1] * 6, *[0] * 194)).verdict == "better"
    assert paired(np.zeros((200, 1)), column(*[-1] * 6, *[0] * 194)).verdict == "worse"


@pytest.mark.parametrize(("won", "of"), [(290, 500), (1142, 1632), (0, 5), (5, 5)])
def test_wilson_is_scipys(won, of):
    expected = binomtest(won, of).proportion_ci(method="wilson")
    assert wilson(won / of, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_by_the_card():
    """evaluation.md section 9: 290/500 -> [0.5363, 0.6225], 1142/1632 -> [0.6771, 0.7215]."""
    assert [round(x, 4) for x in (*wilson(0.58, 500), *wilson(1142 / 1632, 1632))] == [0.5363, 0.6225, 0.6771, 0.7215]


def test_prompts_needed_by_hand():
    """Win rate 0.6 of 0/1: variance 0.24 * 100/99; (1.96 + 0.8416)^2 = 7.849; 0.2424 * 7.849/0.01 = 190.3 -> 191."""
    assert prompts_needed(np.asarray([1.0] * 60 + [0.0] * 40)) == 191
    assert prompts_needed(np.full(10, 0.5)) is None


def test_prompts_needed_has_its_power():
    """At that size, with that truth, about four runs of five are decided."""
    random = np.random.default_rng(5)
    runs = [
        paired(np.full((191, 1), 0.5), random.binomial(1, 0.6, (191, 1)).astype(float), seed=i, resamples=400)
        for i in range(200)
    ]
    assert 0.7 < sum(run.verdict == "better" for run in runs) / 200 < 0.9


def test_sentences():
    better = paired(np.zeros((60, 1)), np.ones((60, 1)))
    worse = paired(np.ones((60, 1)), np.zeros((60, 1)))
    level = paired(np.ones((60, 1)), np.ones((60, 1)))
    open_ = paired(np.zeros((50, 1)), column(*[1.0] * 28, *[-1.0] * 22))
    assert better.sentence.startswith(
        "The aligned model is better: it wins 100.0% of 60 prompts (95% interval 94.0% to 100.0%"
    )
    assert worse.sentence.startswith("The aligned model is worse: it wins only 0.0% of 60 prompts")
    assert level.verdict == "undecided" and level.sentence.endswith("As many were won as lost.")
    assert open_.sentence.startswith("No difference is shown at this size") and "it needs about 550 prompts" in open_.sentence


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one shape"):
        paired(np.zeros((3, 1)), np.zeros((4, 1)))


def test_holm_by_hand():
    """0.01, 0.04, 0.03, 0.005 of four: sorted 0.005*4 = 0.02, 0.01*3 = 0.03, 0.03*2 = 0.06, then 0.04*1 = 0.04 -> 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_holm_keeps_the_error_of_the_family():
    """Of 2,000 studies of 5 level models, at most 5 % + 3 errors of 0.5 % may call any of them different."""
    draw = np.random.default_rng(3)
    p = draw.uniform(size=(2000, 5))
    assert 0.035 <= np.mean([min(holm(row)) < 0.05 for row in p]) <= 0.065


def test_sweep_names_the_best_and_its_doubt():
    """Means 0.5, 0.75, 0.75: the first of equals is best, and resampling cannot tell it from the other."""
    rise = np.linspace(0, 1, 40)[:, None]
    found = sweep({"0": rise, "0.5": rise + 0.25, "1": rise[::-1] + 0.25}, resamples=2000)
    assert found.best == "0.5" and found.scores == pytest.approx({"0": 0.5, "0.5": 0.75, "1": 0.75})
    assert found.picked["0"] == 0 and 0.4 < found.picked["0.5"] < 0.6 and sum(found.picked.values()) == pytest.approx(1)
    gone = sweep({"a": np.asarray([[1.0], [NAN]]), "b": np.asarray([[0.0], [9.0]])}, resamples=10)
    assert gone.scores == {"a": 1.0, "b": 0.0}  # the prompt that one is not scored on counts for none
    assert sweep({"a": column(NAN)}) is None


def experiments(count: int, prompts: int, seeds: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores [E, n, S] of 0, 1/2 (a tie) and 1 against a base of 1/2, and the true win rates [E].

    Each experiment has its own share of ties and its own win rate, 0.3 to 0.9; each prompt has its own leaning around that
    (beta distributed), which the pictures of several seeds share.
    """
    rate, ties = random.uniform(0.3, 0.9, (count, 1, 1)), random.uniform(0, 0.6, (count, 1, 1))
    leaning = random.beta(4 * rate, 4 * (1 - rate), (count, prompts, 1))
    won = (random.random((count, prompts, seeds)) < leaning).astype(float)
    scores = np.where(random.random(won.shape) < ties, 0.5, won)
    return scores, (ties / 2 + (1 - ties) * rate)[:, 0, 0]


@pytest.mark.parametrize(("prompts", "seeds"), [(30, 1), (30, 4), (100, 1), (100, 2), (192, 1), (192, 4)])
def test_coverage_over_2000_experiments(prompts, seeds):
    """The 95 % interval of the win rate holds the truth in 93 to 97 % of 2,000 experiments, by the code's own percentiles.

    A resample of rows with few distinct values is a multinomial draw of their counts: the same distribution as ``bootstrap``
    resamples from, 50 times as fast. ``test_coverage_of_paired_itself`` takes the long way.
    """
    random = np.random.default_rng([prompts, seeds])
    scores, truth = experiments(2000, prompts, seeds, random)
    rows, tail, inside = outcomes(np.full(scores.shape, 0.5), scores).mean(2), statistics.expanded_tail(prompts), 0
    for row, value in zip(rows, truth, strict=True):
        values, counts = np.unique(row, return_counts=True)
        means = random.multinomial(prompts, counts / prompts, size=1000) @ values / prompts
        low, high = np.quantile(means, [tail, 1 - tail]) if len(values) > 1 else wilson(float(values[0]), prompts)
        inside += low <= value <= high
    assert 0.93 <= inside / 2000 <= 0.97


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("prompts", "seeds"), [(30, 2), (100, 2), (192, 2)])
def test_coverage_of_paired_itself(prompts, seeds):
    random = np.random.default_rng([prompts, seeds, 1])
    scores, truth = experiments(2000, prompts, seeds, random)
    inside = 0
    for i in range(2000):
        result = paired(np.full((prompts, seeds), 0.5), scores[i], seed=i, resamples=1000)
        inside += result.win_rate_low <= truth[i] <= result.win_rate_high
    assert 0.93 <= inside / 2000 <= 0.97


def test_coverage_of_the_difference():
    """Of the mean difference, with skewed scores (squares of normals): 30 prompts are few for those, 0.90 at least."""
    random = np.random.default_rng(11)
    for prompts, least in ((30, 0.9), (192, 0.93)):
        inside = 0
        for i in range(600):
            gains = random.standard_normal((prompts, 1)) ** 2
            result = paired(np.zeros((prompts, 1)), gains, seed=i, resamples=500)
            inside += result.difference_low <= 1 <= result.difference_high
        assert least <= inside / 600 <= 0.97, prompts
