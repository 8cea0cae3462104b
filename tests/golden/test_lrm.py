"""The Latent Reward Model's loss by number: lpo_lrm.md sections 2b and 9."""

import math

import pytest
import torch

from diffalign.likelihood import LatentScores
from diffalign.methods import Preference
from diffalign.models.latent_reward import TAU
from diffalign.objectives import Pairwise
from diffalign.process import Discrete, Inverted, Shared
from diffalign.types import Batch, Cond, Estimate, Memory

from .test_likelihood import context, sd_process

BRADLEY_TERRY = Pairwise(beta=1, reference_free=True, less_entropy=True)


def pair(soft=None, utility=(1.0, 0.0), b=1):
    return Batch(x0=torch.zeros(b, 2, 1, 2, 2), cond=Cond(tokens=torch.zeros(b, 1, 1)), utility=torch.tensor([utility] * b),
                 valid=torch.ones(b, 2, dtype=torch.bool), key=torch.arange(2 * b).view(b, 2),
                 soft=None if soft is None else torch.full((b,), soft))


def loss(scores, **batch):
    scores = torch.as_tensor([scores], dtype=torch.float32).requires_grad_()
    nothing = torch.full_like(scores, torch.nan)
    est = Estimate(policy=scores, reference=None, error=nothing, reference_error=None, t=torch.full_like(scores, 0.5))
    per_group = BRADLEY_TERRY(est, pair(**batch), Memory()).per_group
    slope, = torch.autograd.grad(per_group.sum(), scores)
    return per_group.item(), slope[0].tolist()


def test_scale_of_the_first_temperature():
    """Check 5: cosines 0.6 and 0.8 at tau = 2.6592: d = -2.857, P(win) = sigmoid(d) = 0.0543, L = softplus(2.857) = 2.9128."""
    winner, loser = (math.exp(TAU) * cosine for cosine in (0.6, 0.8))
    value, slope = loss((winner, loser))
    assert value == pytest.approx(2.9128, abs=2e-4)
    assert math.exp(-value) == pytest.approx(0.0543, abs=1e-4)
    assert slope == pytest.approx([math.exp(-value) - 1, 1 - math.exp(-value)], abs=1e-4)   # pulls d up by 1 - P


@pytest.mark.parametrize("d, value", [(0.0, 0.0), (1.3, 0.19786), (-1.3, 0.19786)])
def test_ties_cost_what_exceeds_log_2(d, value):
    """Check 5: (softplus(-1.3) + softplus(1.3))/2 - ln 2 = (0.24100 + 1.54100)/2 - 0.69315 = 0.19786."""
    found, slope = loss((d, 0.0), soft=0.5, utility=(0.5, 0.5))
    assert found == pytest.approx(value, abs=1e-5)
    assert slope[0] == pytest.approx(1 / (1 + math.exp(-d)) - 0.5, abs=1e-6) and slope[1] == -slope[0]


def test_soft_labels_cost_their_divergence():
    """p = 0.8: KL(0.8 || sigmoid(d)) is 0 at d = ln 4 and 0.8 ln 1.6 + 0.2 ln 0.4 = 0.192745 at d = 0."""
    assert loss((math.log(4), 0.0), soft=0.8)[0] == pytest.approx(0.0, abs=1e-6)
    assert loss((0.0, 0.0), soft=0.8)[0] == pytest.approx(0.192745, abs=1e-6)


def test_one_time_a_pair_and_a_noise_for_each_picture():
    """lpo_lrm.md 2b: one t; independent noise. SPO's judge shares it."""
    seen = {}

    def predict(name, xt, t, cond):
        seen.update(name=name, xt=xt, t=t)
        return xt.flatten(1).mean(1)

    times = Discrete(timesteps=tuple(range(951, 0, -50)))
    est = LatentScores(times=times)(pair(b=40), context(predict, sd_process()))
    t = seen["t"].view(40, 2)
    assert seen["name"] == "policy" and torch.equal(t[:, 0], t[:, 1]) and est.policy.shape == est.t.shape == (40, 2)
    levels = {round(float(level) * 1000) - 1 for level in t[:, 0]}
    assert levels <= set(range(1, 952, 50)) and len(levels) > 10
    xt = seen["xt"].view(40, 2, -1)
    assert not any(torch.equal(x[0], x[1]) for x in xt)   # both pictures are zeros: what differs is the noise
    LatentScores(times=times, noise=Shared())(pair(b=40), context(predict, sd_process()))
    assert torch.equal(*(seen["xt"].view(40, 2, -1)[:, i] for i in (0, 1)))
    assert est.reference is None and est.error.isnan().all() and est.importance is None


def test_the_loop_sees_scores_and_no_errors():
    """Accuracy and its bins are counted, the errors that a score does not have are not."""
    def predict(name, xt, t, cond):
        assert name == "policy"
        return torch.tensor([2.0, 1.0, 1.0, 3.0])

    method = Preference(LatentScores(), BRADLEY_TERRY)
    found = method.loss(pair(b=2), context(predict, sd_process()))
    assert method.reads == ("policy",) and found.metrics["accuracy"].tolist() == [1.0, 0.0]
    assert found.metrics["win_error"].isnan().all() and "win_error_change" not in found.metrics
    assert found.per_group.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(2))])


def test_options():
    for wrong in ({"noise": Inverted()}, {"guidance_scale": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LatentScores(**wrong)
