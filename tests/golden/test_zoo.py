"""Golden numbers of lm_objectives.md, rankdpo.md, smpo.md and diffusion_kto.md, with their arithmetic.

The zoo's toy: c_w = 2, c_l = -1, beta = 0.5, so beta c_w = 1, beta c_l = -0.5, margin 3, h = 1.5; epsilon = 0.1.
"""

import math

import pytest
import torch

from diffalign.objectives import (
    BCO,
    DCG,
    EXO,
    KTO,
    NCA,
    ORPO,
    SPPO,
    AllPairs,
    APODown,
    APOZero,
    DiscoPOP,
    FDivergence,
    Hinge,
    Logistic,
    Offset,
    Pairwise,
    PlackettLuce,
    Robust,
    SetContrast,
    SoftMargin,
    SoftTarget,
    Squared,
)
from diffalign.types import Batch, Cond, Estimate, Memory

BETA = 0.5


def groups(ratios, utility, valid=None, dtype=torch.float64):
    """ratios, utility: [B, K] -> estimate whose log-ratios are ``ratios``, and its batch."""
    ratio = torch.tensor(ratios, dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(ratio)
    est = Estimate(policy=ratio, reference=zero, error=-2 * ratio, reference_error=zero, t=zero)
    batch = Batch(x0=torch.zeros(*ratio.shape, 1), cond=Cond(tokens=torch.zeros(len(ratio), 1, 1)),
                  utility=torch.tensor(utility, dtype=dtype), key=torch.zeros(len(ratio), 2, dtype=torch.int64),
                  valid=torch.ones_like(ratio, dtype=torch.bool) if valid is None else torch.tensor(valid))
    return est, batch, ratio


def value(objective, ratios=((2.0, -1.0),), utility=((1.0, 0.0),), memory=None, **kwargs):
    est, batch, _ = groups(ratios, utility, **kwargs)
    return objective(est, batch, memory or Memory()).per_group.sum().item()


@pytest.mark.parametrize("link, expected", [
    (Logistic(), 0.201413),                       # ln(1 + e^-1.5)
    (Logistic(smoothing=0.1), 0.351413),          # 0.201413 + 0.1 * 1.5
    (Robust(flip=0.1), 0.013913),                 # (0.201413 - 0.1 * (0.201413 + 1.701413)) / 0.8
    (Hinge(), 0.0),
    (Squared(), 4.0),                             # (3 - 1)^2
    (EXO(epsilon=0.1), 0.031139),
    (NCA(), 1.206931),
    (BCO(), 0.787339),                            # ln(1 + e^-1) + ln(1 + e^-0.5)
    (SPPO(), 1.0),                                # (2 - 1)^2 + (-1 + 1)^2
    (APOZero(), 0.646482),
    (APODown(), 0.913484),
    (DiscoPOP(temperature=0.05), 0.223130),       # e^-1.5, the mix is saturated
    (FDivergence(divergence="forward_kl"), 0.242841),
    (FDivergence(divergence="js"), 0.439915),
    (FDivergence(divergence="alpha", alpha=0.5), 0.245142),
])
def test_links(link, expected):
    assert value(Pairwise(beta=BETA, link=link)) == pytest.approx(expected, abs=1e-6)


def test_labels():
    # an offset of 0.5: ln(1 + e^-(1.5 - 0.5)) = 0.313262
    assert value(Pairwise(beta=BETA, labels=Offset(constant=0.5))) == pytest.approx(0.313262, abs=1e-6)
    # ODPO, alpha 1, gap e^0.5: log gap = 0.5
    odpo = Pairwise(beta=BETA, labels=Offset(alpha=1.0))
    assert value(odpo, utility=((math.exp(0.5), 0.0),)) == pytest.approx(0.313262, abs=1e-6)
    # MMPO, gamma 2.2, gap 0.5: p = 0.750260
    mmpo = Pairwise(beta=BETA, labels=SoftTarget(gamma=2.2))
    assert value(mmpo, utility=((0.5, 0.0),)) == pytest.approx(0.576023, abs=1e-6)
    # SmPO: p = 0.7 is a gap of ln(7/3) at temperature 1; kappa 10, beta 0.2, margin 0.1: softplus(-0.2 * 10 * 0.4 * 0.1)
    smpo = Pairwise(beta=0.2, labels=SoftMargin(kappa=10))
    assert value(smpo, ((0.05, -0.05),), ((math.log(7 / 3), 0.0),)) == pytest.approx(0.6539469673175899, abs=1e-9)


def test_smpo_is_symmetric_and_silent_at_even_odds():
    smpo = Pairwise(beta=0.2, labels=SoftMargin(), pairs=AllPairs())
    assert value(smpo, ((0.3, -0.2),), ((0.4, 0.0),)) == pytest.approx(value(smpo, ((-0.2, 0.3),), ((0.0, 0.4),)))
    est, batch, ratio = groups(((0.3, -0.2),), ((1e-12, 0.0),))
    smpo(est, batch, Memory()).per_group.sum().backward()
    assert ratio.grad.abs().max() < 1e-10


def test_bco_centre_reads_last_steps_mean():
    memory, objective = Memory(), Pairwise(beta=BETA, link=BCO(), centre=True)
    est, batch, _ = groups(((2.0, -1.0),), ((1.0, 0.0),))
    first = objective(est, batch, memory)
    assert first.per_group.item() == pytest.approx(0.787339, abs=1e-6)  # the mean is still 0
    total, count = first.observed["log_ratio"]
    assert (total.item(), count.item()) == (1.0, 2.0)
    memory.update({"log_ratio": (1.0, 2.0)})  # mean 0.5: ln(1 + e^-0.75) + ln(1 + e^-0.75)
    assert objective(est, batch, memory).per_group.item() == pytest.approx(2 * math.log1p(math.exp(-0.75)), abs=1e-9)


def test_rankdpo():
    # card check 1 and 2: evenly spaced phi, policy = reference: ln 2 * 1.832461
    rank = Pairwise(beta=1.0, pairs=AllPairs(), labels=DCG())
    phi = ((1.0, 2 / 3, 1 / 3, 0.0),)
    est, batch, ratio = groups(((0.0, 0.0, 0.0, 0.0),), phi)
    loss = rank(est, batch, Memory())
    loss.per_group.sum().backward()
    assert loss.per_group.item() == pytest.approx(1.270165, abs=1e-6)
    assert (-2 * ratio.grad[0]).tolist() == pytest.approx([1.574905, 0.011870, -0.569717, -1.017058], abs=1e-6)
    # check 3: delta = (-0.0004, 0, 0.0001, 0.0002), kappa 2500, so beta * ratio = -2500 * delta
    deltas = (-0.0004, 0.0, 0.0001, 0.0002)
    assert value(Pairwise(beta=5000, pairs=AllPairs(), labels=DCG()), (tuple(-d / 2 for d in deltas),), phi) == pytest.approx(
        0.499797, abs=1e-6)
    assert value(Pairwise(beta=5000, pairs=AllPairs(), labels=DCG()), (tuple(d / 2 for d in deltas),), phi) > 1.27
    # check 4: K = 2, phi (1, 0): 0.532456 times DPO; RELIABILITY: utilities .9 .5 .1, log-ratios .05 .02 -.03, beta 2
    assert value(Pairwise(beta=BETA, labels=DCG())) == pytest.approx(0.532456 * 0.201413, abs=1e-6)
    # with the base-2 logarithm; ours is natural, as the paper prints it: 1/ln 2 times as much
    rank2 = Pairwise(beta=2, pairs=AllPairs(), labels=DCG())
    found = value(rank2, ((0.05, 0.02, -0.03),), ((0.9, 0.5, 0.1),))
    assert found * math.log(2) == pytest.approx(0.3843354952267046, abs=1e-9)
    # check 6: all equal: nothing
    assert value(rank, ((0.3, 0.1, 0.2, 0.0),), ((0.5, 0.5, 0.5, 0.5),)) == 0


def test_plackett_luce():
    three = value(PlackettLuce(beta=2), ((0.05, 0.02, -0.03),), ((0.9, 0.5, 0.1),))
    assert three == pytest.approx(1.6718381081117606, abs=1e-9)
    assert value(PlackettLuce(beta=1), ((0.2, 0.5, -0.1),), ((1.0, 0.5, 0.0),)) == pytest.approx(1.565878, abs=1e-6)
    assert value(PlackettLuce(beta=BETA)) == pytest.approx(value(Pairwise(beta=BETA)), abs=1e-12)
    ragged = value(PlackettLuce(beta=BETA), ((2.0, -1.0, 9.0),), ((1.0, 0.0, 0.5),), valid=((True, True, False),))
    assert ragged == pytest.approx(0.201413, abs=1e-6)


def test_set_contrast():
    # card check 3: s = (.2, .5, -.1), Y+ = {1, 2}, w = 1: .274034
    assert value(SetContrast(beta=1), ((0.2, 0.5, -0.1),), ((1.0, 0.9, 0.0),)) == pytest.approx(0.274034, abs=1e-6)
    assert value(SetContrast(beta=BETA)) == pytest.approx(0.201413, abs=1e-6)
    assert value(SetContrast(beta=1), ((0.2, 0.5),), ((0.5, 0.5),)) == 0


def test_kto():
    # log-ratio c is half of the card's g; toy of the zoo: q = 0, beta c = 1 and -0.5 with g: 1 - sigmoid(1), 1 - sigmoid(0.5)
    kto = KTO(beta=0.25)
    assert value(kto, ((2.0,),), ((1.0,),)) == pytest.approx(0.268941, abs=1e-6)
    assert value(kto, ((-1.0,),), ((-1.0,),)) == pytest.approx(0.377541, abs=1e-6)
    # card check 2: g = (.0010, .0004, -.0002, .0000), labels + + + -, z = .0003, beta 1000: L = 0.463712; 5000: 0.378355
    gains, likes = (0.0010, 0.0004, -0.0002, 0.0), (1.0, 1.0, 1.0, -1.0)
    memory = Memory()
    memory.update({"kto_gain": (0.0012, 4.0)})
    ratios, utility = tuple((g / 2,) for g in gains), tuple((y,) for y in likes)
    assert value(KTO(beta=1000), ratios, utility, memory) / 4 == pytest.approx(0.463712, abs=1e-6)
    assert value(KTO(beta=5000), ratios, utility, memory) / 4 == pytest.approx(0.378355, abs=1e-6)
    # check 3: a negative baseline is clamped; check 1: 0.5 at policy = reference
    low = Memory()
    low.update({"kto_gain": (-4.0, 4.0)})
    assert value(KTO(), ((0.0,), (0.0,)), ((1.0,), (-1.0,)), low) == pytest.approx(1.0)
    # RELIABILITY: beta 2 and baseline 0.01 on log-ratios 0.05, -0.05 (our beta is on twice the log-ratio)
    base = Memory()
    base.update({"kto_gain": (0.02, 1.0)})
    assert value(KTO(beta=1), ((0.05,),), ((1.0,),), base) == pytest.approx(0.48001065984441815, abs=1e-9)
    assert value(KTO(beta=1), ((-0.05,),), ((-1.0,),), base) == pytest.approx(0.47003594823542827, abs=1e-9)
    # utilities at policy = reference: 1.6931 for loss_averse, 0.3069 for risk_seeking
    assert value(KTO(utility="loss_averse"), ((0.0,),), ((1.0,),)) == pytest.approx(1 + math.log(2))
    assert value(KTO(utility="risk_seeking"), ((0.0,),), ((1.0,),)) == pytest.approx(1 - math.log(2))


def test_orpo():
    # mean log-probs -1 and -1.2: log-odds gap .300293, penalty .554231; 1 + 0.1 * .554231 = 1.055423
    assert value(ORPO(weight=0.1), ((-0.5, -0.6),)) == pytest.approx(1.055423, abs=1e-6)


def test_simpo_and_repo():
    # SimPO b = 2, gamma = 1 on scores -1, -1.2: -log sigmoid(2 * 0.2 - 1) = 1.037488; RePO gamma .5: .3 = .5 * hinge(beta 2)
    simpo = Pairwise(beta=2, reference_free=True, labels=Offset(constant=1.0))
    assert value(simpo, ((-1.0, -1.2),)) == pytest.approx(1.037488, abs=1e-6)
    assert 0.5 * value(Pairwise(beta=2, link=Hinge(), reference_free=True), ((-1.0, -1.2),)) == pytest.approx(0.3)


def test_discopop_trap():
    # slope +0.784264 and value .846574 at h = 0: a golden number of the trap
    est, batch, ratio = groups(((0.0, 0.0),), ((1.0, 0.0),))
    loss = Pairwise(beta=1.0, link=DiscoPOP())(est, batch, Memory())
    loss.per_group.sum().backward()
    assert loss.per_group.item() == pytest.approx(0.846574, abs=1e-6)
    assert ratio.grad[0, 0].item() == pytest.approx(0.784264, abs=1e-6)


def test_cdpo_minimum():
    est, batch, ratio = groups(((math.log(9), 0.0),), ((1.0, 0.0),))
    Pairwise(beta=1.0, link=Logistic(smoothing=0.1))(est, batch, Memory()).per_group.sum().backward()
    assert ratio.grad.abs().max() < 1e-12  # h = ln((1-e)/e) = ln 9
