"""Scores, thresholds and pairs, by hand; the numbers of Prompt-A-Video's released code."""

import pytest

from diffalign.language.evolve import Explored, pairs, targets
from diffalign.language.select import Pairs, Score
from diffalign.language.studio import Asked

EVOLVE = Score(weights={"DD": 0.5, "AES": 0.625, "MPS": 0.25})
DPO = Score(weights={"DD": 1.1, "TVA": 1.3, "AES": 0.8, "MPS": 1 / 3}, most_words=130,
            above={"VQ": 2.6, "TC": 2.6, "FC": 2.55, "AES": 5.5, "TVA": 2.9, "MPS": 8.5, "DD": 2.65})
SCORES = {"VQ": 2.8, "TC": 2.8, "FC": 2.8, "TVA": 2.8, "DD": 2.7, "AES": 5.6, "MPS": 9.2}


def test_the_two_published_sums():
    # 4 * 2.8 + 0.5 * 2.7 + 5/8 * 5.6 + 9.2 / 4 = 11.2 + 1.35 + 3.5 + 2.3
    assert EVOLVE(SCORES) == pytest.approx(18.35)
    # 3 * 2.8 + 1.1 * 2.7 + 1.3 * 2.8 + 0.8 * 5.6 + 9.2 / 3 = 8.4 + 2.97 + 3.64 + 4.48 + 3.0667
    assert DPO(SCORES) == pytest.approx(22.556667)


def test_a_missing_score_that_counts_leaves_none():
    assert EVOLVE({**SCORES, "VQ": None}) is None
    assert Score(weights={"VQ": 0})({"VQ": None, "TC": 1.0}) == 1.0


def test_thresholds_are_strict_and_words_and_digits_are_counted():
    good = {**SCORES, "TVA": 2.95}
    assert DPO.allows("a cat", good)
    assert not DPO.allows("a cat", {**good, "DD": 2.65})  # equal is not above
    assert not DPO.allows("a cat", {**good, "DD": None})
    assert DPO.allows("word " * 130, good) and not DPO.allows("word " * 131, good)
    assert Score(most_digits=2).allows("42 cats", {}) and not Score(most_digits=2).allows("142 cats", {})


def test_pairs_by_hand():
    rule = Pairs(ranks=2, gap=1.4)
    candidates = [(str(n), {"s": value}) for n, value in enumerate([22.6, 22.0, 21.3, 20.9, 20.5])]
    # from the first: gaps 0.6, 1.3, 1.7, 2.1; from the second: 0.7, 1.1, 1.5
    assert rule(candidates) == [(0, 3), (0, 4), (1, 4)]
    shuffled = [candidates[n] for n in (3, 0, 4, 1, 2)]
    assert {(shuffled[w][0], shuffled[l][0]) for w, l in rule(shuffled)} == {("0", "3"), ("0", "4"), ("1", "4")}


def test_what_is_not_good_enough_may_be_rejected_but_not_chosen():
    rule = Pairs(ranks=2, gap=0.0, score=Score(above={"s": 2.0}))
    assert rule([("a", {"s": 3.0}), ("b", {"s": 2.0}), ("c", {"s": None})]) == [(0, 1)]


def test_ties_give_no_pair():
    assert Pairs()([("a", {"s": 1.0}), ("b", {"s": 1.0})]) == []


def _explored(own, **texts):
    return Explored(asked=Asked(prompt="p", meaning="m"), own={"s": own}, texts={t: (1, {"s": v}) for t, v in texts.items()})


def test_the_target_is_the_best_text_and_better_than_the_users_own():
    found = [_explored(0.5, a=0.4, b=0.9, c=0.9), _explored(0.9, a=0.9), _explored(None, a=0.1), _explored(0.1, a=None)]
    rows = targets(found, Score())
    assert [(row["completion"], row["score"], row["own_score"]) for row in rows] == [("b", 0.9, 0.5), ("a", 0.1, None)]


def test_pair_rows_name_texts_and_scores():
    assert pairs([_explored(0.0, a=0.1, b=0.9)], Pairs()) == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "chosen_score": 0.9, "rejected_score": 0.1}]


@pytest.mark.parametrize("options", [{"ranks": 0}, {"gap": -1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="must"):
        Pairs(**options)
