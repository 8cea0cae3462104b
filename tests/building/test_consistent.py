"""Multi-preference consistent filtering: the published rules at their borders."""

import math
from pathlib import Path

import pytest

from diffalign.building.filters.consistent import STRATEGIES, TIES, Consistent
from diffalign.building.types import Candidate, Group
from diffalign.errors import DataError


def group(aesthetic, clip, vqa, utility=(1.0, 0.0)):
    """A pair whose rewards differ by so much, first minus second."""
    scores = [{"aesthetic": aesthetic, "clip": clip, "vqa": vqa}, {"aesthetic": 0.0, "clip": 0.0, "vqa": 0.0}]
    return Group(id=f"{aesthetic} {clip} {vqa} {utility}", prompt="a red ring", utility=utility,
                 candidates=tuple(Candidate(image=f"{i}.png", scores=s) for i, s in enumerate(scores)))


def kept(spec, *groups):
    found = spec(list(groups), folder=Path(), seed=0)
    assert found.report["kept"] == len(found.groups)
    assert found.report["kept"] + sum(found.report["dropped"].values()) == len(groups)
    return [g in found.groups for g in groups]


@pytest.mark.parametrize("strategy, passes", [(1, [True, False, False, False]), (2, [True, True, False, False]),
                                              (3, [True, True, True, False])])
def test_the_published_strategies(strategy, passes):
    """The border itself is kept (>=): gaps of the aesthetic score of 0, -0.5, -1 and -1.5."""
    spec = Consistent(least=STRATEGIES[strategy])
    assert kept(spec, *(group(gap, 0.0, 0.0) for gap in (0.0, -0.5, -1.0, -1.5))) == passes
    assert kept(spec, group(5.0, -0.01, 1.0), group(5.0, 1.0, -0.01)) == [False, False]


def test_the_released_code_is_strict():
    spec = Consistent(strict=True)
    assert kept(spec, group(-0.5, 0.1, 0.1), group(-0.4999, 0.1, 0.1), group(0.1, 0.0, 0.1), group(0.1, 0.1, 0.0)) == [
        False, True, False, False]


def test_the_loser_may_come_first():
    """Swapped with its label and its scores a pair is the same pair; swapped with its label alone it is the opposite."""
    turned = group(-1.0, -1.0, -1.0, utility=(0.0, 1.0))
    assert kept(Consistent(), turned, group(1.0, 1.0, 1.0, utility=(0.0, 1.0))) == [True, False]


def test_ties_have_a_rule_of_their_own():
    ties = [group(0.2, 0.03, 0.07, (0.5, 0.5)), group(-0.2, -0.03, -0.07, (0.5, 0.5)), group(0.21, 0.0, 0.0, (0.5, 0.5)),
            group(0.0, -0.04, 0.0, (0.5, 0.5)), group(0.0, 0.0, 0.08, (0.5, 0.5))]
    assert kept(Consistent(), *ties) == [False] * 5
    assert kept(Consistent(ties=TIES), *ties) == [True, True, False, False, False]
    assert kept(Consistent(ties=TIES, strict=True), *ties) == [False] * 5


def test_what_could_not_be_scored_is_dropped_and_counted():
    spec = Consistent(least={"clip": 0.0})
    found = spec([group(1.0, math.nan, 1.0), group(1.0, 1.0, 1.0, (math.nan, 1.0)), group(1.0, 1.0, math.nan)],
                 folder=Path(), seed=0)
    assert found.report == {"groups": 3, "kept": 1, "dropped": {"unscored": 2}}


def test_a_reward_that_nobody_gave_is_refused():
    with pytest.raises(DataError, match='"beauty"; scored were: aesthetic, clip, vqa'):
        Consistent(least={"beauty": 0.0})([group(1.0, 1.0, 1.0)], folder=Path(), seed=0)
    assert Consistent()([], folder=Path(), seed=0).groups == []
    for wrong in ({"least": {}}, {"least": {"clip": math.nan}}, {"ties": {"clip": -1.0}}):
        with pytest.raises(ValueError, match="least|ties"):
            Consistent(**wrong)
