"""Held-out accuracy of a latent reward model, against scorers whose mistakes are known."""

import pytest
import torch

from diffalign.evaluate.preference import heldout_preference, heldout_scores
from diffalign.evaluate.statistics import wilson
from diffalign.process import Shared

from .test_preference import Model, batch, context


def scorer(sign):
    """Scores the mean of x_t, as ``sign(t)`` says; winners are filled with 1, losers with -1."""
    def predict(name, xt, t, cond):
        assert name == "policy" and not torch.is_grad_enabled() and len(cond.tokens) == len(xt)
        return sign(t) * (xt.flatten(1).mean(1) > 0).float()
    return context(predict)


def test_by_noise_level():
    """Right below t = 0.4, wrong from 0.4 to 0.8, mute above: fifths of 1, 1, 0, 0 and a half."""
    rows = [batch(range(20)), batch(range(20, 30))]
    knows = scorer(lambda t: torch.where(t <= 0.4, 10.0, torch.where(t <= 0.8, -10.0, 0.0)))
    found = heldout_scores(knows, rows, draws=10, noise=Shared())
    clean, grey, _, _, noise = found.accuracy.by_time
    assert found.pairs == 30 and found.draws == 10 and noise == 0.5
    assert clean == 1.0 and grey > 0.95   # a mean above 0 is nearly sure while the picture is seen
    assert found.accuracy.by_time[2] < 0.1 and found.accuracy.by_time[3] < 0.3
    assert found.accuracy.per_draw == pytest.approx(sum(found.accuracy.by_time) / 5, abs=0.02)


def test_intervals_count_pairs_and_not_draws():
    found = heldout_scores(scorer(lambda t: torch.ones_like(t)), [batch(range(12))], draws=40).accuracy
    assert (found.by_time_low[0], found.by_time_high[0]) == wilson(1.0, 12)
    assert wilson(1.0, 12)[0] < 0.8 < wilson(1.0, 12 * 8)[0]


def test_the_same_draws_again_and_the_same_pairs_in_any_batch():
    mixed = scorer(lambda t: torch.sin(1000 * t))
    whole = heldout_scores(mixed, [batch(range(9))])
    assert whole == heldout_scores(mixed, [batch(range(9))]) == heldout_scores(mixed, [batch([0, 1]), batch(range(2, 9))])
    assert heldout_scores(mixed, [batch(range(3), utility=(1.0, 1.0))]) is None


def test_what_is_logged_and_what_is_reported():
    found = heldout_scores(scorer(lambda t: torch.ones_like(t)), [batch(range(6))])
    bins = {f"accuracy_t{i}" for i in range(5)}
    assert set(found.figures()) == {"accuracy", "accuracy_low", "accuracy_high", "margin", *bins}
    tree = found.tree()
    assert tree["after"] == found.accuracy.value and tree["before"] is None and tree["by_time"] == found.accuracy.by_time


def test_other_methods_have_the_intervals_too():
    found = heldout_preference(context(Model(policy=1.0, reference=0.0)), [batch(range(5))], draws=10).accuracy
    assert (found.by_time_low, found.by_time_high) == ([wilson(1.0, 5)[0]] * 5, [wilson(1.0, 5)[1]] * 5)
