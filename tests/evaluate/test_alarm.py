"""When the alarm fires and when it doesn't: by hand, by simulation under no change, and under planted changes."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.stats import t as student

from diffalign.evaluate.alarm import Alarm, Band, Limits, alarm
from diffalign.evaluate.looks import LOOKS
from diffalign.evaluate.monitor import MonitorSpec, see
from diffalign.evaluate.sides import Side, as_one
from diffalign.rewards.rules import Brightness, Colourfulness

NAMES = list(LOOKS)


class World:
    """P prompts with S pictures each: every statistic and score has variance 1/2 between and 1/2 inside prompts; base and
    aligned share the prompts, and of what is inside a part, the seed's."""

    def __init__(self, seed, prompts=64, pictures=4, shared=0.5):
        self.rng, self.shape, self.shared = np.random.default_rng(seed), (prompts, pictures), shared

    def scores(self, rise=0.0):
        """[2, P, S]."""
        own = self.rng.normal(0, (0.5 - 0.5 * self.shared)**0.5, (2, *self.shape))
        both = self.rng.normal(0, 0.5**0.5, (self.shape[0], 1)) + self.rng.normal(0, (0.5 * self.shared)**0.5, self.shape)
        return both + own + np.array([0, rise])[:, None, None]

    def looks(self, shifts=None):
        """[2, statistics, P, S]; shifts: of one statistic each. On a scale on which a deviation is above every ``least``."""
        shifts = shifts or {}
        return 100 * np.stack([self.scores(shifts.get(i, 0.0)) for i in range(len(NAMES))], 1)

    def spread(self, ratio=1.0):
        """[2, P]."""
        base = self.rng.gamma(20, 1, self.shape[0])
        return np.stack([base, ratio * base * self.rng.normal(1, 0.15, self.shape[0])])


def rate(runs=200, training=0.5, judge=0.0, shifts=None, ratio=1.0, without_judge=False, limits=None, **world):
    """Share of experiments in which the alarm fires."""
    fired = 0
    for seed in range(runs):
        w = World(seed, **world)
        fired += alarm(w.looks(shifts), training=w.scores(training), judge=None if without_judge else w.scores(judge),
                       diversity=w.spread(ratio), limits=limits).fired
    return fired / runs


# --- false alarms ---

@pytest.mark.parametrize("world", [{"prompts": 16, "pictures": 2}, {"prompts": 64}, {"prompts": 100, "pictures": 1}])
@pytest.mark.parametrize("judge", [0.0, 0.5])
def test_a_rise_without_any_other_change_is_silent(world, judge):
    """Training reward up by half a deviation; everything else as it was."""
    assert rate(judge=judge, **world) <= 0.02


def test_the_intervals_themselves_keep_their_level():
    """Without the limits on size (0: every significant change counts) the table and diversity together mislead in 5 %."""
    bare = Limits(shift=0, doubted_shift=0, diversity=0.999999, doubted_diversity=0.999999, fall=9.0)
    measured = rate(400, limits=bare, without_judge=True, shared=0.0)
    assert measured <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400), measured


def test_ten_thousand_prompts_do_not_make_a_hundredth_an_alarm():
    w = World(0, 10_000, 2)
    found = alarm(w.looks({0: 0.05, 3: -0.05}), training=w.scores(0.5), judge=w.scores(-0.05), diversity=w.spread(0.95))
    assert found.statistics[0].low > 0 and found.judge.fell and found.diversity.high < 1, "each is significant"
    assert not found.fired


@pytest.mark.parametrize("shift", [0.4, 0.8])
def test_a_better_model_may_look_different(shift):
    """The judge rises with the training reward: the wide limits hold."""
    assert rate(training=0.6, judge=0.6, shifts={0: shift, 5: -shift}, ratio=0.55) == 0


def test_a_change_of_just_the_limit_is_not_beyond_it():
    assert rate(judge=0.0, shifts={0: 0.5}) <= 0.05


def test_few_pictures_have_the_benefit_of_the_doubt():
    """Judge and training reward rise alike, but eight prompts don't show it: the wide limits hold all the same."""
    assert rate(training=0.5, judge=0.5, ratio=0.45, prompts=8, pictures=2) <= 0.03


def test_a_few_pictures_that_all_move_alike_stay_in_the_band():
    """Eight prompts, one picture each; all move by one deviation exactly, so the interval has no width. But drawing again
    would move the mean by root(2 / 8) = 0.5 deviations, times Student's 2.36."""
    looks = np.tile([0.3, 0.7], 4)[None, None, :, None].repeat(2, 0)
    looks[1] += 1.1 * 0.2
    row = alarm(looks, names=["brightness"]).statistics[0]
    assert row.low > 1 and row.band_high == pytest.approx(0.5 * student.ppf(0.975, 7)) and not row.left


# --- power ---

@pytest.mark.parametrize("planted", [{"shifts": {0: 1.0}}, {"shifts": {8: -1.0}}, {"ratio": 0.5}, {"judge": -0.6}])
def test_a_planted_hack_fires(planted):
    assert rate(100, training=1.0, **planted) >= 0.95


@pytest.mark.parametrize("planted", [{"shifts": {4: 1.6}}, {"ratio": 0.25}])
@pytest.mark.parametrize("judge", [{"judge": 1.0}, {"without_judge": True}])
def test_a_large_change_fires_whatever_the_judge_says(planted, judge):
    assert rate(100, training=1.0, **planted, **judge) >= 0.95


def test_few_pictures_find_a_large_hack():
    assert rate(100, training=1.5, judge=-0.5, shifts={0: 1.5}, prompts=16, pictures=2) >= 0.95


# --- what must hold for every alarm ---

def test_no_alarm_where_the_training_reward_does_not_rise():
    for rise in (0.0, -1.0):
        w = World(1)
        found = alarm(w.looks({0: 3.0}), training=w.scores(rise), judge=w.scores(-1.0), diversity=w.spread(0.2))
        assert found.statistics[0].left and found.diversity.fell and not found.fired


def test_without_a_training_reward_its_rise_is_taken_for_granted():
    w = World(1)
    found = alarm(w.looks({0: 3.0}), judge=w.scores(-1.0))
    assert found.fired and found.training is None and found.gap is None and "taken for granted" in found.notes[0]
    assert not alarm(w.looks(), judge=w.scores(0.0)).fired
    worse = alarm(w.looks(), judge=w.scores(-1.0))
    assert worse.judge.fell and not worse.fired, "a worse model is no hacked one"
    assert alarm(w.looks({0: 0.8}), judge=w.scores(-1.0)).fired and not alarm(w.looks({0: 0.8}), judge=w.scores(0.0)).fired


def test_five_prompts_say_nothing():
    w = World(0, prompts=5)
    found = alarm(w.looks({0: 9.0}), training=w.scores(9.0), judge=w.scores(-9.0), diversity=w.spread(0.1))
    assert found.fired is None and found.prompts == 5 and "too few" in found.sentence and found.verdict == "not enough prompts"


def test_the_sentence_says_what_happened():
    looks, scores = np.zeros((2, 1, 8, 2)), np.zeros((2, 8, 2))
    looks[0, 0], looks[1, 0] = [0.4, 0.6], [0.58, 0.78]      # all by 1.8 deviations; the band: see below
    training = scores + [[[0.3, 0.5]], [[0.7, 0.9]]]
    judge = scores + [[[0.7, 0.9]], [[0.4, 0.6]]]
    found = alarm(looks, training=training, judge=judge, names=["brightness"])
    assert found.fired and found.sentence == (
        "Reward hacking: while the training reward rose from 0.4 to 0.8, the held-out judge fell from 0.8 to 0.5; brightness "
        "rose by 1.8 standard deviations of the base (band \N{PLUS-MINUS SIGN}1.4; from 0.5 to 0.68).")
    four = np.concatenate([looks] * 4, axis=1)
    assert alarm(four, training=training, names=list("abcd")).sentence.endswith("; and 1 more.")
    assert found.gap.shift == pytest.approx(4 + 3)           # +0.4 and -0.3 in deviations of 0.1
    assert "diversity was not measured" in found.notes[0]


def test_the_band_by_hand():
    """Two pictures a prompt, 0 and 2: variance inside 2, of all pictures 1. Eight prompts: the mean of a second drawing
    differs by a standard deviation of root(2 * 2 / 16) = 0.5, times Student's 2.36 at 7 degrees of freedom (2.84 for each
    of two tests)."""
    values = np.tile([0.0, 2.0], (8, 1))
    band = Band.of(values, 0.5, 0.95)
    assert band.deviation == 1 and band.redraw == pytest.approx(0.5 * student.ppf(0.975, 7)) and band.half == band.redraw
    assert Band.of(np.tile(values, (100, 1)), 0.5, 0.95).half == 0.5, "many pictures: the limit"
    assert Band.of(values, 0.5, 0.95, least=4.0).deviation == 4.0


def test_the_band_covers_a_second_drawing_of_the_base():
    outside = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        base, again = rng.normal(0, 1, (12, 1)) + rng.normal(0, 1, (2, 12, 3))
        band = Band.of(base, 0.0, 0.95)
        outside += abs(again.mean() - base.mean()) / band.deviation > band.half
    assert outside / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_pictures_that_are_all_alike_do_not_blow_a_change_up():
    """Every base picture has a contrast of 0.2; one of 0.202 is a fifth of the least deviation, 0.01."""
    looks = np.full((2, 1, 10, 2), 0.2)
    looks[1] += 0.002
    row = alarm(looks, names=["contrast"]).statistics[0]
    assert row.shift == pytest.approx(0.2) and not row.left


def test_nan_is_left_out_in_pairs():
    w = World(3)
    looks, training = w.looks({0: 2.0}), w.scores(1.0)
    whole = alarm(looks, training=training)
    looks, training = looks.copy(), training.copy()
    looks[0, :, 0, 1], training[1, 5, 2], training[:, 7] = np.nan, np.nan, np.nan
    cut = alarm(looks, training=training)
    assert cut.fired and cut.prompts == 64 and cut.training.base != whole.training.base
    assert cut.statistics[0].shift == pytest.approx(whole.statistics[0].shift, abs=0.02)
    assert alarm(looks, judge=np.full((2, 64, 4), np.nan)).judge is None, "a judge that scored nothing is none"


def test_order_and_scale_do_not_matter():
    w = World(4)
    looks, scores, variety = w.looks({1: 1.2}), w.scores(0.8), w.spread(0.6)
    first = alarm(looks, training=scores, diversity=variety)
    order = np.random.default_rng(0).permutation(64)
    second = alarm(7 * looks[:, :, order] - 30, training=3 * scores[:, order] + 1, diversity=5 * variety[:, order])
    for a, b in zip(first.statistics, second.statistics, strict=True):
        assert (a.shift, a.low, a.high, a.left) == pytest.approx((b.shift, b.low, b.high, b.left))
    assert first.diversity.ratio == pytest.approx(second.diversity.ratio) and first.fired == second.fired
    assert first.training.low == pytest.approx(second.training.low)


def test_a_collapse_to_one_picture_is_seen():
    w = World(5)
    found = alarm(w.looks(), training=w.scores(1.0), diversity=np.stack([np.full(64, 60.0), np.zeros(64)]))
    assert found.fired and found.diversity.ratio == 0 and "become alike" in found.reasons[0]


def test_a_judge_that_was_never_content_still_counts():
    """All base scores 0: there is no deviation of the base to divide by."""
    w = World(6)
    judge = np.zeros((2, 64, 4))
    judge[1, ::2] = 1.0
    assert alarm(w.looks(), training=w.scores(1.0), judge=judge).judge.rose
    equal = np.full((2, 64, 3), 0.1)  # whose computed deviation is 1e-17
    assert alarm(w.looks()[..., :3], training=equal, judge=equal).gap.shift == 0
    assert abs(alarm(w.looks()[..., :3], training=equal + [[[0.0]], [[0.2]]]).training.shift) < 1


@pytest.mark.parametrize("options, message", [
    ({"shift": -1.0}, "shift must not be negative, got -1.0"),
    ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
    ({"doubted_shift": 2.0}, "doubted_shift must not exceed shift 1.0, got 2.0"),
    ({"doubted_diversity": 0.1}, "doubted_diversity must not be below diversity 0.4, got 0.1"),
])
def test_limits_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"statistics must be \[2, 9, prompts, pictures\], got \(2, 3, 4, 5\)"):
        alarm(np.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="judge"):
        alarm(World(0).looks(), judge=np.zeros((2, 3, 4)))


def test_it_is_plain_data():
    w = World(0)
    found = alarm(w.looks(), training=w.scores(1.0), judge=w.scores(), diversity=w.spread())
    assert isinstance(found, Alarm) and json.loads(json.dumps(asdict(found)))["fired"] is False


def test_a_judge_that_is_trained_on_is_not_held_out_in_the_monitor():
    """``MonitorSpec.judge`` may come from evaluate.judge and ``reward`` from the source, and be one and the same."""
    w = World(2, 16, 2)
    looks, scores, variety = w.looks(), w.scores(0.5), w.spread()
    base, now = (Side(statistics=looks[i], spread=variety[i], scores=scores[i], rewards={"0": scores[i]}) for i in range(2))
    own = see(base, now, MonitorSpec(judge=Brightness()), [(Brightness(), 1.0)])
    assert own.alarm.judge is None and own.alarm.gap is None and "no held-out judge" in " ".join(own.alarm.notes)
    assert own.wins is not None and own.alarm.training.rose
    assert see(base, now, MonitorSpec(judge=Brightness()), [(Colourfulness(), 1.0)]).alarm.judge.rose
    bare = (Side(statistics=side.statistics, spread=side.spread, scores=side.scores) for side in (base, now))
    assert see(*bare, MonitorSpec(judge=Brightness())).alarm.judge.rose


def test_the_log_calls_nothing_calm_on_five_prompts():
    w = World(0, prompts=5)
    looks, nothing = w.looks(), np.full(5, np.nan)
    base, now = (Side(statistics=looks[i], spread=nothing, scores=None) for i in range(2))
    assert "alarm" not in see(base, now, MonitorSpec()).figures
    enough = World(0, prompts=6).looks()
    base, now = (replace(side, statistics=enough[i], spread=np.full(6, np.nan)) for i, side in enumerate((base, now)))
    assert see(base, now, MonitorSpec()).figures["alarm"] == 0


def test_several_rewards_count_by_weight_and_sign():
    """Base scores 0, 2 (mean 1, deviation 1) and 0, 20 (10, 10); now 3, 3 and 0, 0: z is 2 and -1. Weights 3 and -1 give
    (3 * 2 + 1 * 1) / 4 = 1.75, and the base's -1, 1 and 1, -1 give (3 * -1 + 1 * 1) / 4 = -0.5 and 0.5."""
    up = [np.array([[0.0, 2.0]]), np.array([[3.0, 3.0]])]
    down = [np.array([[0.0, 20.0]]), np.array([[0.0, 0.0]])]
    base, now = as_one([up, down], [3.0, -1.0])
    assert base.tolist() == [[-0.5, 0.5]] and now.tolist() == [[1.75, 1.75]]
    base, now = as_one([up, down], [0.0, -0.5])  # alone it keeps its unit
    assert base.tolist() == [[0.0, -20.0]] and now.tolist() == [[0.0, 0.0]]
    assert as_one([up], [2.0])[1].tolist() == [[3.0, 3.0]] and as_one([], []) is None and as_one([up], [0.0]) is None
    flat = as_one([[np.ones((2, 2)), 2 * np.ones((2, 2))], up], [1.0, 1.0])  # a checker that is never content has no deviation
    assert np.isfinite(flat[1]).all()


def test_a_reward_that_less_was_better_of_falls_when_it_is_optimised():
    w = World(5)
    scores = w.scores(-1.0)
    training = as_one([list(scores)], [-1.0])
    assert alarm(w.looks(), training=np.stack(training)).training.rose
