"""Moments of scripts/gradient_variance.py against known ones, and what corrected densities do to the mean gradient."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference
from diffalign.objectives import Pairwise
from diffalign.process import Geometric, Independent, LogitNormal, LowDiscrepancy, Mixture, Stratified, Uniform
from diffalign.types import Batch, Cond

from ..e2e.conftest import ROOT
from .test_likelihood import batch_of, context

sys.path.insert(0, str(ROOT / "scripts"))
from gradient_variance import Sample, agreement, cut, ratio  # noqa: E402

# --- the mean gradient ----------------------------------------------------------------------------------------------


def gradient(estimator: DenoisingELBO, groups: int = 4000) -> tuple[float, float]:
    """Mean and its standard error of the loss's gradient to the policy's one number, over many keys of one pair. The winner is
    twice as large as the loser, so that their margin depends on the time."""
    one, draw = batch_of(b=1), torch.Generator().manual_seed(1)
    x0 = torch.randn(1, 1, 4, 4, 4, generator=draw)
    many = Batch(x0=torch.cat([2 * x0, x0], 1).repeat(groups, 1, 1, 1, 1),
                 cond=Cond(tokens=one.cond.tokens.repeat(groups, 1, 1)),
                 utility=one.utility.repeat(groups, 1), valid=one.valid.repeat(groups, 1), place=torch.arange(groups),
                 key=torch.stack([torch.arange(groups), torch.zeros(groups, dtype=torch.int64)], 1))
    scale = torch.full((groups,), 0.3, requires_grad=True)  # one number a group, so that each group has its own gradient

    def predict(name, xt, t, cond):
        rows = scale.repeat_interleave(2).repeat(len(xt) // (2 * groups)).view(-1, 1, 1, 1)
        return rows * xt if name == "policy" else 0.2 * xt

    loss = Preference(estimator, Pairwise(beta=3)).loss(many, context(predict)).per_group.sum()
    rows, = torch.autograd.grad(loss, scale)
    return rows.mean().item(), rows.std().item() / groups**0.5


@pytest.mark.parametrize("estimator", [
    DenoisingELBO(times=Mixture()), DenoisingELBO(times=Mixture(mean=-1.5)), DenoisingELBO(times=Geometric(corrected=True)),
    DenoisingELBO(times=Geometric(ratio=0.7, corrected=True)), DenoisingELBO(sequence=Stratified(strata=16)),
    DenoisingELBO(sequence=LowDiscrepancy()), DenoisingELBO(times=Mixture(), sequence=Stratified(strata=16))], ids=str)
def test_corrected_densities_and_sequences_leave_the_mean_gradient_alone(estimator):
    (mean, error), (plain, error0) = gradient(estimator), gradient(DenoisingELBO(times=Uniform()))
    assert abs(mean - plain) < 4 * math.hypot(error, error0)


@pytest.mark.parametrize("times", [Geometric(ratio=0.7), Mixture(corrected=False, mean=2.0), LogitNormal(mean=-1.5)], ids=str)
def test_and_uncorrected_ones_do_not(times):
    (mean, error), (plain, error0) = gradient(DenoisingELBO(times=times)), gradient(DenoisingELBO())
    assert abs(mean - plain) > 8 * math.hypot(error, error0), "the check above could not fail"


def test_own_noise_in_a_pair_keeps_the_mean_of_the_margin():
    margins = []
    for noise in (DenoisingELBO(), DenoisingELBO(noise=Independent())):
        batch = replace(batch_of(b=1), key=torch.zeros(1, 2, dtype=torch.int64))
        rows = [noise(replace(batch, key=torch.tensor([[i, 0]])), context(lambda name, xt, t, cond: 0.3 * xt), None).policy
                for i in range(400)]
        margin = torch.stack([row[0, 0] - row[0, 1] for row in rows])
        margins.append((margin.mean().item(), margin.std().item() / 20))
    (a, e), (b, f) = margins
    assert abs(a - b) < 4 * math.hypot(e, f)


# --- the moments ----------------------------------------------------------------------------------------------------

def sample(seed: int, repeats: int, parts: int = 1, noise: float = 1.0, base=None) -> tuple[Sample, np.ndarray]:
    """Gradients around the mean (part + 1, 1, 0, 0, ...), ``noise`` in each of 50 places."""
    draw, part = np.random.default_rng(seed), np.arange(repeats) % parts
    x = noise * draw.standard_normal((repeats, 50))
    x[:, 0] += part + 1
    x[:, 1] += 1
    logits = np.full((repeats, parts), np.nan)
    logits[np.arange(repeats), part] = 3 * draw.standard_normal(repeats)
    return Sample(gram=x @ x.T, cross=x @ (x if base is None else base).T, part=part, logits=logits), x


def mean_over(statistic, count: int = 300, **what) -> float:
    return float(np.mean([statistic(sample(seed, **what)[0]) for seed in range(count)]))


@pytest.mark.parametrize("parts, square", [(1, 2.0), (2, 3.25)])  # of (1, 1); of the mean of (1, 1) and (2, 1)
def test_trace_square_and_logit_variance_have_no_bias(parts, square):
    given = {"repeats": 6, "parts": parts}
    assert mean_over(Sample.trace, **given) == pytest.approx(50, rel=0.02)  # parts' own means are no noise
    assert mean_over(Sample.square, **given) == pytest.approx(square, abs=0.4)  # of noise 50/6 on top, nothing is left
    assert mean_over(Sample.logit, **given) == pytest.approx(9, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    hits = cosines = 0
    for seed in range(60):
        base, x = sample(2 * seed, 16, noise=0.5)
        other, _ = sample(2 * seed + 1, 12, noise=1.0, base=x)
        _, low, high = ratio(other, base, Sample.trace)
        hits += low < 4 < high  # (2 / 1)^2
        found = agreement(sample(2 * seed + 1, 40, noise=0.3, base=x)[0], base)
        cosines += abs(found["cosine"] - 1) < 3 * found["cosine_error"]
    assert hits >= 52 and cosines >= 54
    assert ratio(base, base, Sample.trace) == [1.0, 1.0, 1.0]
    assert ratio(sample(0, 2)[0], base, Sample.trace)[1:] == [None, None], "two repeats have no interval"


def test_a_cut_is_a_step_of_its_own():
    part = cut(replace(batch_of(b=4), place=torch.arange(4) + 100), slice(2, 4))
    assert part.groups == 2 and part.key[:, 0].tolist() == [2, 3] and part.place.tolist() == [0, 1]
    assert len(part.cond.tokens) == 2
