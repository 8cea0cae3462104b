"""Combinations of rewards, with their arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import as_tree, load_reward
from diffalign.errors import ConfigError, DataError, RewardError
from diffalign.reward_training import fit_calibration
from diffalign.rewards import judged
from diffalign.rewards.blend import (
    Calibrated,
    LogSigmoidCentred,
    Minimum,
    WeightedSum,
    ZScore,
    fit_references,
    fit_z_score,
)
from diffalign.rewards.rules import Brightness, Colourfulness, Compressibility
from diffalign.rewards.scenes import SceneChecker

NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Table:
    """A reward that reads its scores from a list, by the number that stands for a picture."""

    scores: tuple[float, ...]
    name: str = "table"
    columns: tuple[str, ...] = ()
    differentiable = True

    def __call__(self, images, prompts, **columns):
        assert set(columns) == set(self.columns)
        return torch.tensor([self.scores[i] for i in images], dtype=torch.float32)


def tables(*rows):
    return tuple(Table(scores=row, name=f"r{number}") for number, row in enumerate(rows))


def combined(blend, count):
    return blend(range(count), ["p"] * count).tolist()


def test_weighted_sum_by_hand():
    """0.5 * 2 + 3 * 10 = 31, 0.5 * 4 - 3 * 1 = -1; without weights 12 and 3."""
    rewards = tables((2, 4), (10, -1))
    assert combined(WeightedSum(rewards=rewards, weights=(0.5, 3.0)), 2) == [31, -1]
    assert combined(WeightedSum(rewards=rewards), 2) == [12, 3]


def test_z_score_by_hand():
    """(22 - 21) / 2 = 0.5 and (0.3 - 0.2) / 0.05 = 2, weights 1 and 0.5: 0.5 + 1 = 1.5."""
    blend = ZScore(rewards=tables((22.0,), (0.3,)), means=(21.0, 0.2), stds=(2.0, 0.05), weights=(1.0, 0.5))
    assert combined(blend, 1) == pytest.approx([1.5], abs=1e-5)


def test_fitted_z_score_is_that_of_the_card():
    """{21, 22, 23}: -1.224745, 0, 1.224745 with ddof 0; NaN is left out of the statistics and stays NaN."""
    blend = fit_z_score(tables((21, NAN, 22, 23)), range(4), ["p"] * 4)
    found = combined(blend, 4)
    assert math.isnan(found.pop(1)) and found == pytest.approx([-1.224745, 0, 1.224745], abs=1e-5)
    with pytest.raises(ConfigError, match='reward "r0" gives all 2 pictures the same score'):
        fit_z_score(tables((5, 5)), range(2), ["p"] * 2)
    with pytest.raises(ConfigError, match='reward "r1" could score none of the 2 pictures'):
        fit_z_score(tables((5, 6), (NAN, NAN)), range(2), ["p"] * 2)


def test_minimum_by_hand():
    """1 * (0.9 - 0) = 0.9 against 0.1 * (21 - 18) = 0.3; 0.1 * (30 - 18) = 1.2 leaves 0.9."""
    blend = Minimum(rewards=tables((0.9, 0.9), (21, 30)), shifts=(0.0, 18.0), weights=(1.0, 0.1))
    assert combined(blend, 2) == pytest.approx([0.3, 0.9], abs=1e-6)


def test_log_sigmoid_centred_is_that_of_the_card():
    """u(-4, -1, 0, 1, 4) = -4.018150, -1.313262, -0.693147, -0.313262, -0.018150; (5, 1) sums to -0.319977 and (2, 2) to
    -0.253856, so that the balanced picture wins although its plain sum is lower. A level of 3 moves all by 3.
    """
    one = LogSigmoidCentred(rewards=tables((-4, -1, 0, 1, 4)), references=(0.0,))
    expected = [-4.018150, -1.313262, -0.693147, -0.313262, -0.018150]
    assert combined(one, 5) == pytest.approx(expected, abs=1e-6)
    moved = LogSigmoidCentred(rewards=tables((-1, 2, 3, 4, 7)), references=(3.0,))
    assert combined(moved, 5) == pytest.approx(expected, abs=1e-6)
    two = LogSigmoidCentred(rewards=tables((5, 2, 5, 1), (1, 2, -5, 1)), references=(0.0, 0.0))
    assert combined(two, 4) == pytest.approx([-0.319977, -0.253856, -5.013431, -0.626523], abs=1e-6)
    scaled = LogSigmoidCentred(rewards=tables((0.5,)), references=(0.3,), scales=(20.0,), weights=(2.0,))
    assert combined(scaled, 1) == pytest.approx([2 * -0.018150], abs=1e-6)
    assert combined(LogSigmoidCentred(rewards=tables((-500, 500)), references=(0.0,)), 2) == [-500, 0]


def test_references_are_a_quantile_of_base_samples():
    """Ten scores 0..9, NaN left out: the 85 % point by linear interpolation is 0.85 * 9 = 7.65."""
    scores = (*range(10), NAN)
    assert fit_references(tables(scores), range(11), ["p"] * 11) == pytest.approx((7.65,))
    assert fit_references(tables(scores), range(11), ["p"] * 11, quantile=0.5) == pytest.approx((4.5,))


BLENDS = [
    lambda parts: WeightedSum(rewards=parts, weights=(0.0, 1.0)),
    lambda parts: ZScore(rewards=parts, means=(1.0, 2.0), stds=(0.5, 2.0)),
    lambda parts: Minimum(rewards=parts),
    lambda parts: LogSigmoidCentred(rewards=parts, references=(0.5, 0.5)),
]


@pytest.mark.parametrize("make", BLENDS)
def test_nan_in_any_part_is_nan(make):
    """Even where the weight is 0, and never as the smallest or the largest number."""
    found = make(tables((NAN, 1, 1), (1, NAN, 1)))(range(3), ["p"] * 3)
    assert found.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("make", BLENDS)
def test_a_function_of_one_picture_and_differentiable(make):
    blend = make((Brightness(), Colourfulness()))
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype="uint8")) for _ in range(7)]
    batch = blend(iter(images), [""] * 7)  # an iterator, read once for all parts
    assert torch.equal(batch, torch.cat([blend([image], [""]) for image in images]))
    assert blend.differentiable and not make((Brightness(), Compressibility())).differentiable
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    blend(list(pixels), ["", ""]).sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
    assert blend([], []).shape == (0,)


def test_columns_are_the_union_and_each_part_gets_its_own():
    one, two = Table(scores=(1,), columns=("user",)), Table(scores=(1,), columns=("user", "place"))
    blend = WeightedSum(rewards=(one, two, Table(scores=(1,))))
    assert blend.columns == ("user", "place")
    assert blend([0], ["p"], user=["u"], place=["x"]).tolist() == [3]


def test_identity_nests():
    inner = WeightedSum(rewards=(Brightness(), Compressibility(quality=80)), weights=(1.0, 2.0))
    outer = Minimum(rewards=(inner, Colourfulness()))
    assert json.loads(json.dumps(outer.identity())) == {
        "parts": [
            {"name": "weighted_sum", "weights": [1.0, 2.0],
             "parts": [{"name": "brightness"}, {"name": "compressibility", "quality": 80}]},
            {"name": "colourfulness"},
        ], "shifts": [], "weights": []}


def test_options_are_checked():
    rewards = tables((1,), (2,))
    for make, message in [
        (lambda: WeightedSum(rewards=()), "rewards must hold at least one"),
        (lambda: WeightedSum(rewards=rewards, weights=(1.0,)), "weights must hold one number for each of the 2 "),
        (lambda: WeightedSum(rewards=rewards, weights=(1.0, math.inf)), "weights must be finite"),
        (lambda: ZScore(rewards=rewards, stds=(1.0, 0.0)), "stds must be above 0"),
        (lambda: Minimum(rewards=rewards, weights=(1.0, -1.0)), "weights must be above 0"),
        (lambda: LogSigmoidCentred(rewards=rewards, references=()), "references must hold one level for each"),
        (lambda: LogSigmoidCentred(rewards=rewards, references=(0.0, 0.0), scales=(0.0, 1.0)), "scales must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_a_part_that_breaks_its_promise_is_named():
    @dataclass(frozen=True)
    class Wrong:
        name = "wrong"
        differentiable = False

        def __call__(self, images, prompts):
            return torch.zeros(1)

    with pytest.raises(RewardError, match=r'reward "wrong" gave scores of shape \(1,\) for 3 pictures'):
        WeightedSum(rewards=(Wrong(),))(range(3), ["p"] * 3)


def test_a_part_that_fails_is_named_and_lists_of_numbers_are_scores():
    """As alone: what `judged` takes from a reward, a combination takes from its parts."""
    class Part:
        name, differentiable = "part", False

        def __init__(self, scores):
            self.scores = scores

        def __call__(self, images, prompts):
            return self.scores or 1 / 0

    assert WeightedSum(rewards=(Part([1, 2]), Part([True, False])))([None, None], ["", ""]).tolist() == [2, 2]
    with pytest.raises(RewardError, match='reward "part" failed on 2 pictures .ZeroDivisionError'):
        judged(Minimum(rewards=(Part([1, 2]), Part(None))), [None, None], ["", ""])


# Calibration.


def planted(weights, pairs=4000, seed=0):
    """Pairs whose winner was drawn from sigmoid(w . difference): scores of winner and loser, [P, R] each."""
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, pairs, len(weights))) * [1, 10, 0.1][: len(weights)]
    first = random.random(pairs) < 1 / (1 + np.exp(-(a - b) @ weights))
    return np.where(first[:, None], a, b), np.where(first[:, None], b, a)


def test_calibration_finds_planted_weights(tmp_path):
    """On scales of 1, 10 and 0.1. The chance of the likelier side, averaged, is the best accuracy there is; the interval of
    the cross-validated one must hold it.
    """
    truth = np.array([1.0, 0.05, 8.0])
    winner, loser = planted(truth)
    found = fit_calibration(["a", "b", "c"], winner, loser, [str(i // 2) for i in range(4000)])
    assert np.allclose(found.weights, truth, rtol=0.15)
    best = (1 / (1 + np.exp(-abs((winner - loser) @ truth)))).mean()
    assert found.accuracy.low < best < found.accuracy.high and found.accuracy.prompts == 2000 and found.pairs == 4000

    found.save(tmp_path / "weights.json")
    parts = tuple(Table(scores=(1.0, 2.0), name=name) for name in "abc")
    blend = Calibrated(rewards=parts, path=str(tmp_path / "weights.json"))
    blend.check()
    assert combined(blend, 2) == pytest.approx([sum(found.weights), 2 * sum(found.weights)], rel=1e-6)
    assert blend.identity()["weights"] == list(found.weights)


def test_calibration_without_negative_weights_is_the_bounded_minimum():
    """The second reward is noise with a negative twin: bounded at 0, the rest solves its own problem exactly."""
    winner, loser = planted([1.0, -0.2])
    texts = [str(i) for i in range(len(winner))]
    free = fit_calibration(["a", "b"], winner, loser, texts, non_negative=False)
    bound = fit_calibration(["a", "b"], winner, loser, texts)
    alone = fit_calibration(["a"], winner[:, :1], loser[:, :1], texts)
    assert free.weights[1] < 0 and bound.weights[1] == 0
    assert bound.weights[0] == pytest.approx(alone.weights[0], rel=1e-3)


def test_calibration_leaves_nan_out_and_refuses_what_says_nothing():
    winner, loser = planted([1.0], pairs=50)
    winner[:7] = NAN
    texts = [str(i) for i in range(50)]
    found = fit_calibration(["a"], winner, loser, texts)
    assert (found.pairs, found.left_out) == (43, 7)
    with pytest.raises(DataError, match='reward "b" gives both pictures of every pair the same score'):
        fit_calibration(["a", "b"], np.ones((50, 2)) * [[2, 1]], np.ones((50, 2)), texts)
    with pytest.raises(DataError, match="at least two prompts, got 1"):
        fit_calibration(["a"], winner, loser, ["same"] * 50)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "no readable calibration"), ("[]", "is no calibration"),
     ('{"rewards": ["x"], "weights": [1]}', r"was fitted for \['x'\], in this order, but the rewards are \['r0'\]"),
     ('{"rewards": ["r0"], "weights": [NaN]}', "one finite weight"),
     ('{"rewards": ["r0"], "weights": []}', "one finite weight"),
     ('{"rewards": ["r0"], "weights": [true]}', "one finite weight")])
def test_a_bad_calibration_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Calibrated(rewards=tables((1,)), path=str(path)).check()
    assert "\n" not in str(caught.value)


def test_recipes_build_nested_combinations():
    inner = {"kind": "weighted_sum", "rewards": ["brightness"]}
    tree = {"kind": "minimum", "weights": [1.0, 2.0], "rewards": ["scenes", inner]}
    blend = load_reward(tree)
    assert blend == Minimum(rewards=(SceneChecker(), WeightedSum(rewards=(Brightness(),))), weights=(1.0, 2.0))
    assert load_reward(as_tree(blend)) == blend
    with pytest.raises(ConfigError, match="reward.stds: must be above 0"):
        load_reward({"kind": "z_score", "rewards": ["scenes"], "stds": [0.0]})
