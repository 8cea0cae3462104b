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
    Regularized,
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


@pytest.mark.parametrize("gap, factor, loss", [
    (0.01, 0.300065, 0.554328),    # PickScores 0.22 and 0.21: 10 tanh(0.060031 / 2); the logit is 2500 * 0.0004 * factor
    (0.033428, 1.0, 0.313262)])    # 2 * 0.16658 * artanh(0.1): as strong as Diffusion-DPO (its check 2)
def test_smpo_by_the_difference_of_pickscores(gap, factor, loss):
    """smpo.md checks 1 to 3: kappa 10, temperature PickScore's range, changes of error that differ by -0.0004."""
    labels = SoftMargin(kappa=10, temperature=0.28201571106910706 - 0.11543526500463486)
    est, batch, _ = groups(((1e-4, -1e-4),), ((0.21 + gap, 0.21),))
    assert labels(batch, *torch.tensor([[0], [0], [1]])).scale.item() == pytest.approx(factor, abs=2e-5)
    found = Pairwise(beta=5000, labels=labels)(est, batch, Memory())
    assert found.metrics["logit"].item() == pytest.approx(factor, abs=2e-5)
    assert found.per_group.item() == pytest.approx(loss, abs=1e-5)


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


def pair_weights(phi, dtype=torch.float64):
    """{(better, worse): weight} of every ordered pair of one list."""
    _, batch, _ = groups(((0.0,) * len(phi),), (phi,), dtype=dtype)
    b, w, l = AllPairs()(batch)
    return dict(zip(zip(w.tolist(), l.tolist(), strict=True), DCG()(batch, b, w, l).weight.tolist(), strict=True))


def test_rankdpo_weight_of_every_pair():
    """rankdpo.md check 1: G = 2^phi - 1 = 1, .587401, .259921, 0; 1/ln(1 + rank) = 1.442695, .910239, .721348, .621335."""
    found = pair_weights((1.0, 2 / 3, 1 / 3, 0.0))
    expected = {(0, 1): 0.219691, (0, 2): 0.533854, (0, 3): 0.821360, (1, 2): 0.061858, (1, 3): 0.169703, (2, 3): 0.025995}
    assert found == {pair: pytest.approx(weight, abs=1e-6) for pair, weight in expected.items()}
    assert sum(found.values()) == pytest.approx(1.832461, abs=1e-6)
    # with the base-2 logarithm (online_dpo.md check 4): 1 - 1/log2 5 = .569323 and (.630930 - .5) * .327480 = .042877
    assert found[0, 3] * math.log(2) == pytest.approx(0.569323, abs=1e-6)
    assert found[1, 2] * math.log(2) == pytest.approx(0.042877, abs=1e-6)
    # datasets.md check 8: Syn-Pic's votes 0, 2/3, 5/6, whose ranks are 3, 2, 1
    votes = pair_weights((0.0, 2 / 3, 5 / 6))
    assert [votes[2, 0], votes[1, 0], votes[2, 1]] == pytest.approx([0.563948, 0.110955, 0.103507], abs=1e-6)


def test_rankdpo_follows_its_images():
    """rankdpo.md checks 5, 6 and 8: an order of the pictures or a constant changes nothing; the best one's error must fall."""
    rank, phi, ratios = Pairwise(beta=5000, pairs=AllPairs(), labels=DCG()), (1.0, 0.4, 0.4, 0.1), (3e-4, 1e-4, 0.0, -1e-4)
    plain, order = value(rank, (ratios,), (phi,)), (2, 0, 3, 1)
    assert value(rank, (tuple(ratios[i] for i in order),), (tuple(phi[i] for i in order),)) == pytest.approx(plain, rel=1e-12)
    assert value(rank, (tuple(r + 7e-4 for r in ratios),), (phi,)) == pytest.approx(plain, rel=1e-9)
    assert (1, 2) not in pair_weights(phi) and (2, 1) not in pair_weights(phi)   # a tie is no pair
    nudge = 0.5e-4   # half of a fall of the error by 1e-4
    best, worst = ((ratios[0] + nudge, *ratios[1:]), (*ratios[:3], ratios[3] + nudge))
    assert value(rank, (best,), (phi,)) < plain < value(rank, (worst,), (phi,))


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
    rows = KTO(beta=1000)(*groups(ratios, utility)[:2], memory).per_group      # 1 - sigmoid(1000 y (g - .0003))
    assert (1 - rows).tolist() == pytest.approx([0.6682, 0.5250, 0.3775, 0.5744], abs=5e-5)
    rows = KTO(beta=5000)(*groups(ratios, utility)[:2], memory).per_group
    assert (1 - rows).tolist() == pytest.approx([0.9707, 0.6225, 0.0759, 0.8176], abs=5e-5)
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


def test_kto_slopes():
    """diffusion_kto.md checks 1, 4 and 5: +y beta/4 in the error at the start, 4.5e-5 of beta where s = 10, none through z."""
    def slope(g, liked, z=0.0, **options):
        memory = Memory()
        memory.update({"kto_gain": (z, 1.0)})
        est, batch, ratio = groups(((g / 2,),), ((1.0 if liked else -1.0,),))
        KTO(beta=1000, **options)(est, batch, memory).per_group.sum().backward()
        return -ratio.grad.item() / 2     # d/d error: the log-ratio is minus half of it

    assert slope(0.0, True) == pytest.approx(250) and slope(0.0, False) == pytest.approx(-250)
    assert slope(0.010, True) == pytest.approx(1000 * 4.5396e-5, rel=1e-4)
    assert slope(-0.010, True, utility="loss_averse") == pytest.approx(1000, rel=1e-4)
    step, memory = 1e-7, Memory()
    memory.update({"kto_gain": (3e-4, 1.0)})       # z stays where it is when a picture's own gain moves
    up, down = (value(KTO(beta=1000), (((g + d) / 2,),), ((1.0,),), memory) for g, d in ((1e-3, step), (1e-3, -step)))
    assert slope(1e-3, True, z=3e-4) == pytest.approx(-(up - down) / (2 * step), rel=1e-5)


def test_orpo():
    # mean log-probs -1 and -1.2: log-odds gap .300293, penalty .554231; 1 + 0.1 * .554231 = 1.055423
    assert value(ORPO(weight=0.1), ((-0.5, -0.6),)) == pytest.approx(1.055423, abs=1e-6)


def test_simpo_and_repo():
    # SimPO b = 2, gamma = 1 on scores -1, -1.2: -log sigmoid(2 * 0.2 - 1) = 1.037488; RePO gamma .5: .3 = .5 * hinge(beta 2)
    simpo = Pairwise(beta=2, reference_free=True, labels=Offset(constant=1.0))
    assert value(simpo, ((-1.0, -1.2),)) == pytest.approx(1.037488, abs=1e-6)
    assert 0.5 * value(Pairwise(beta=2, link=Hinge(), reference_free=True), ((-1.0, -1.2),)) == pytest.approx(0.3)


def test_cpo():
    """lm_objectives.md check 2: beta 0.1 on the sums -10 and -12, an NLL of 1 with weight 1: ln(1 + e^-0.2) + 1 = 1.598139."""
    est, batch, _ = groups(((-10.0, -12.0),), ((1.0, 0.0),))
    est = Estimate(policy=est.policy, reference=None, error=torch.ones_like(est.error), reference_error=None, t=est.t)
    cpo = Regularized(objective=Pairwise(beta=0.1, reference_free=True), sft=1.0)
    assert cpo(est, batch, Memory()).per_group.item() == pytest.approx(1.598139, abs=1e-6)


@pytest.mark.parametrize("link, expected", [
    (Logistic(), 0.6931), (Hinge(), 1.0), (Squared(), 25.0), (EXO(epsilon=0.1), 0.5108), (NCA(), 1.3863), (Robust(), 0.6931),
    (BCO(), 1.3863), (SPPO(), 50.0), (APOZero(), 1.0), (APODown(), 1.0), (DiscoPOP(), 0.8466)], ids=str)
def test_first_loss_of_trls_links(link, expected):
    """trl_reuse.md section 4, policy = reference, beta 0.1. IPO (0 - 5)^2; SPPO twice that; EXO ln(1/2) - ln(.9 * .1)/2."""
    assert value(Pairwise(beta=0.1, link=link), ((0.0, 0.0),)) == pytest.approx(expected, abs=5e-5)


def test_slope_of_dpo_at_the_toy():
    """lm_objectives.md check 7: d/dh at h = 1.5 is -sigmoid(-1.5) = -.182426; on c_w and c_l beta times that."""
    est, batch, ratio = groups(((2.0, -1.0),), ((1.0, 0.0),))
    Pairwise(beta=BETA)(est, batch, Memory()).per_group.sum().backward()
    assert ratio.grad[0].tolist() == pytest.approx([-BETA * 0.182426, BETA * 0.182426], abs=1e-6)


def test_links_under_unit_noise_of_the_logit():
    """lm_objectives.md check 8, by quadrature over h = N(0, 1): E DPO = .806059 for .693147 without noise (vrpo.md 5.8), and
    E (h - 1/2)^2 = 1.25 for 0.25: a square sees the variance itself."""
    h = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.exp(-h**2 / 2) / math.sqrt(2 * math.pi)
    for link, noisy, still in ((Logistic(), 0.806059, 0.693147), (Squared(scaled=True), 1.25, 0.25)):
        assert torch.trapezoid(link(h, torch.zeros_like(h), 1.0) * density, h).item() == pytest.approx(noisy, abs=1e-6)
        assert link(h[2000:2001], torch.zeros(1), 1.0).item() == pytest.approx(still, abs=1e-6)


def test_margins_inside_the_link_or_outside():
    """vrpo.md check 5: margins of +-2, each as often: the mean loss 1.12693; of the mean of two, +-2 or 0, .91004; of one of
    each, .693147."""
    loss = lambda *z: Logistic()(torch.tensor(z, dtype=torch.float64), torch.zeros(len(z)), 1.0).mean().item()
    assert [loss(2, -2), loss(2, 0, 0, -2), loss(0)] == pytest.approx([1.12693, 0.91004, 0.693147], abs=5e-6)


def test_discopop_has_a_dip_and_a_hill():
    """lm_objectives.md trap 8: least .78592 at h = -.11857, highest .87829 at +.07201."""
    h = torch.linspace(-0.5, 0.2, 700_001, dtype=torch.float64)
    loss = DiscoPOP()(h, torch.zeros_like(h), 1.0)
    left = h < 0
    for part, pick, where, height in ((left, torch.argmin, -0.11857, 0.78592), (~left, torch.argmax, 0.07201, 0.87829)):
        at = pick(loss[part])
        assert (h[part][at].item(), loss[part][at].item()) == (pytest.approx(where, abs=2e-5), pytest.approx(height, abs=1e-5))


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
