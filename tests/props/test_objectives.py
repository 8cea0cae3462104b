"""Properties of links, labels and objectives: gradients, extremes, antisymmetry, limiting cases, invariance to the order
inside a group and to the split into micro-batches."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives import (
    BCO,
    DCG,
    EXO,
    KTO,
    LABELS,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AllPairs,
    APODown,
    APOZero,
    BestWorst,
    DiscoPOP,
    FDivergence,
    GapWeight,
    Hard,
    Hinge,
    Logistic,
    MaPO,
    MaPOAAAI,
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
from diffalign.objectives import LINKS as LINK_TABLE
from diffalign.objectives import OBJECTIVES as OBJECTIVE_TABLE
from diffalign.types import Batch, Cond, Estimate, Memory

MARGIN_LINKS = [Logistic(), Logistic(smoothing=0.2), Robust(flip=0.2), Squared(), Hinge()]
LINKS = [*MARGIN_LINKS, EXO(epsilon=0.1), DiscoPOP(), NCA(), BCO(), SPPO(), APOZero(), APODown(),
         *[FDivergence(divergence=name) for name in ("reverse_kl", "forward_kl", "js", "alpha")]]
OBJECTIVES = [*[Pairwise(beta=b, link=link) for link in LINKS for b in (1.0, 50.0)], Pairwise(beta=3, pairs=AllPairs()),
              Pairwise(beta=3, reference_free=True), MaPO(), MaPOAAAI(), SFT(),
              Regularized(objective=Pairwise(beta=5), sft=0.3), KTO(beta=3), ORPO(), PlackettLuce(beta=2),
              SetContrast(beta=2, alpha=0.1), KTO(beta=3, utility="loss_averse"), KTO(beta=3, utility="risk_seeking"),
              Pairwise(beta=3, link=BCO(), centre=True), Regularized(objective=Pairwise(beta=5), winner=0.7),
              *[Pairwise(beta=3, pairs=AllPairs(), labels=x) for x in
                (Hard(), DCG(), SoftMargin(), SoftTarget(), Offset(constant=0.2, alpha=0.5), GapWeight(power=-0.5))]]
LABELERS = [Hard(), DCG(), SoftMargin(kappa=3), SoftTarget(gamma=2), Offset(constant=0.2, alpha=0.5), GapWeight(power=0.5),
            GapWeight(power=-0.5)]


def groups(error, reference, utility=None, valid=None):
    """error, reference: [B, K]."""
    b, k = error.shape
    if utility is None:
        utility = torch.arange(k, 0, -1, dtype=torch.float32).expand(b, k)
    batch = Batch(x0=torch.zeros(b, k, 1), cond=Cond(tokens=torch.zeros(b, 1, 1)), utility=utility,
                  valid=torch.ones(b, k, dtype=torch.bool) if valid is None else valid,
                  key=torch.zeros(b, 2, dtype=torch.int64))
    est = Estimate(policy=-error / 2, reference=-reference / 2, error=error, reference_error=reference, t=torch.rand(b, k))
    return est, batch


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradcheck(objective):
    g = torch.Generator().manual_seed(1)
    error = torch.rand(24, 3, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.rand(24, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: objective(*groups(e, reference), Memory()).per_group, error)


def ratios(c, utility, *, soft=None, valid=None, free=False):
    """c: [B, K] log-ratios. free: as an objective without a reference sees them, c is the policy's own likelihood."""
    zero = torch.zeros_like(c)
    batch = Batch(x0=torch.zeros(*c.shape, 1), cond=Cond(tokens=torch.zeros(len(c), 1, 1)), utility=utility, soft=soft,
                  valid=torch.ones_like(utility, dtype=torch.bool) if valid is None else valid,
                  key=torch.zeros(len(c), 2, dtype=torch.int64))
    return Estimate(policy=c, reference=None if free else zero, error=-2 * c, reference_error=None if free else zero,
                    t=zero), batch


def loss_of(objective, c, utility, memory=None, **kwargs):
    return objective(*ratios(c, utility, **kwargs), memory or Memory()).per_group


def random_pairs(seed=3, groups=16, k=2):
    """Log-ratios [groups, k] around 0 and the utilities of candidates, the first best."""
    g = torch.Generator().manual_seed(seed)
    c = 2 * torch.randn(groups, k, generator=g, dtype=torch.float64)
    return c, torch.arange(k, 0, -1, dtype=torch.float64).expand(groups, k)


def test_the_lists_here_hold_the_whole_zoo():
    for table, here in ((LINK_TABLE, LINKS), (OBJECTIVE_TABLE, OBJECTIVES), (LABELS, LABELERS)):
        assert set(table.values()) == {type(item) for item in here}


@pytest.mark.parametrize("beta", [0.5, 3.0])
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_gradcheck_of_links(link, beta):
    c, _ = random_pairs()
    winner, loser = (side.clone().requires_grad_() for side in c.unbind(1))
    assert torch.autograd.gradcheck(lambda w, l: link(w, l, beta), (winner, loser))


@pytest.mark.parametrize("softly", [False, True])
@pytest.mark.parametrize("link", [Logistic(), BCO()], ids=str)
@pytest.mark.parametrize("labels", LABELERS, ids=str)
def test_gradcheck_of_labels(labels, link, softly):
    c, _ = random_pairs(groups=8, k=3)
    utility = torch.rand(8, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    soft = torch.linspace(0.5, 1, 8, dtype=torch.float64) if softly else None
    for pairs in (AllPairs(), BestWorst()):
        loss = functools.partial(loss_of, Pairwise(beta=1.5, link=link, labels=labels, pairs=pairs), soft=soft)
        assert torch.autograd.gradcheck(loss, (c.clone().requires_grad_(), utility))


@pytest.mark.parametrize("softly", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_batch_is_its_two_halves(objective, softly):
    """Groups do not see each other: losses are those of the micro-batches, and what is observed adds up."""
    g = torch.Generator().manual_seed(5)
    c = torch.randn(8, 4, generator=g, dtype=torch.float64)
    utility, valid = torch.rand(8, 4, generator=g).double(), torch.rand(8, 4, generator=g) > 0.2
    utility[2] = 0.5
    memory = Memory()
    memory.update({"log_ratio": (0.3, 1.0), "kto_gain": (0.2, 1.0)})
    soft = 0.5 + torch.rand(8, generator=g).double() / 2 if softly else None

    def loss(rows):
        est, batch = ratios(c[rows], utility[rows], valid=valid[rows], soft=None if soft is None else soft[rows])
        return objective(est, batch, memory)

    whole, parts = loss(slice(None)), [loss(slice(0, 3)), loss(slice(3, None))]
    assert whole.per_group.count_nonzero() >= 2  # a hinge is 0 for most
    assert torch.allclose(whole.per_group, torch.cat([part.per_group for part in parts]), rtol=1e-12, atol=1e-12)
    for name, (total, count) in whole.observed.items():
        assert total.item() == pytest.approx(sum(part.observed[name][0].item() for part in parts))
        assert count.item() == sum(part.observed[name][1].item() for part in parts)


DPO = Pairwise(beta=1.3)


@pytest.mark.parametrize("objective", [
    Pairwise(beta=1.3, link=Robust(flip=0.0)),
    Pairwise(beta=1.3, link=Logistic(smoothing=0.0)),
    Pairwise(beta=1.3, link=FDivergence(divergence="reverse_kl")),
    Pairwise(beta=1.3 / 7, link=FDivergence(divergence="reverse_kl", scale=7)),
    Pairwise(beta=1.3, link=FDivergence(divergence="alpha", alpha=1 + 1e-9)),
    Pairwise(beta=1.3, link=FDivergence(divergence="alpha", alpha=1 - 1e-9)),
    Pairwise(beta=1.3, labels=SoftTarget(gamma=1e3)),  # MMPO, p = 1
    Pairwise(beta=1.3, labels=SoftMargin(kappa=1, temperature=1e-3)),
    Pairwise(beta=1.3, labels=Offset()),
    Pairwise(beta=1.3, labels=Offset(alpha=2.0)),  # ODPO at a gap of 1: log 1 = 0
    Pairwise(beta=1.3, labels=GapWeight(power=0)),
    Pairwise(beta=1.3, pairs=AllPairs()),
    PlackettLuce(beta=1.3),
    SetContrast(beta=1.3),
    SetContrast(beta=1.3, alpha=0.7),  # both are as far from the mean
    Regularized(objective=DPO),
], ids=str)
def test_reduces_to_dpo(objective):
    c, utility = random_pairs()
    by_hand = F.softplus(-1.3 * (c[:, 0] - c[:, 1]))
    assert torch.allclose(loss_of(DPO, c, utility), by_hand, rtol=1e-12)
    assert torch.allclose(loss_of(objective, c, utility), by_hand, rtol=1e-6)


def test_simpo_without_a_margin_is_dpo_without_a_reference():
    c, utility = random_pairs()
    simpo = Pairwise(beta=1.3, reference_free=True, labels=Offset(constant=0.0))
    found = loss_of(simpo, c, utility, free=True)
    assert torch.allclose(found, F.softplus(-1.3 * (c[:, 0] - c[:, 1])), rtol=1e-12)
    gamma = dataclasses.replace(simpo, labels=Offset(constant=0.4))
    assert torch.allclose(loss_of(gamma, c, utility, free=True), F.softplus(0.4 - 1.3 * (c[:, 0] - c[:, 1])), rtol=1e-12)


def test_kto_on_a_pair_is_a_pointwise_link():
    """A like and a dislike, averaged, without a reference point. KTO's beta is on twice the log-ratio."""
    c, utility = random_pairs()
    for name, link, shift in (("sigmoid", APOZero(), 0), ("loss_averse", BCO(), 1)):
        kto, pair = KTO(beta=0.6, utility=name, baseline=False), Pairwise(beta=1.2, link=link)
        assert torch.allclose(loss_of(kto, c, utility), loss_of(pair, c, utility) / 2 + shift, rtol=1e-12)


def test_orpo_without_odds_is_sft():
    error = torch.rand(6, 2, dtype=torch.float64)
    a, b = (objective(*groups(error, error), Memory()).per_group for objective in (ORPO(weight=0), SFT()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_margin_links_see_the_margin_alone(link):
    """Equal and opposite partials, and no change when both sides move; pointwise links fail both."""
    c, _ = random_pairs()
    winner, loser = (side.clone().requires_grad_() for side in c.unbind(1))
    loss = link(winner, loser, 1.3)
    for_winner, for_loser = torch.autograd.grad(loss.sum(), (winner, loser))
    bent = getattr(link, "divergence", "reverse_kl") != "reverse_kl"
    pointwise = bent or isinstance(link, (NCA, BCO, SPPO, APOZero, APODown))
    assert torch.allclose(for_winner, -for_loser, atol=1e-12) != pointwise
    assert torch.allclose(link(winner + 0.7, loser + 0.7, 1.3), loss, atol=1e-12) != pointwise


@pytest.mark.parametrize("divergence, sides", [
    ("reverse_kl", (50.0, 60.0)), ("reverse_kl", (-60.0, -50.0)), ("js", (-60.0, -50.0)), ("forward_kl", (-60.0, -50.0)),
    ("alpha", (-120.0, -100.0)),
])
def test_f_divergence_pushes_far_out(divergence, sides):
    """Whole-latent nats are large: a winner far below its loser must still be pulled up. It was not, above 40 nats."""
    winner, loser = (torch.tensor([side], requires_grad=True) for side in sides)
    loss = FDivergence(divergence=divergence)(winner, loser, 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and winner.grad.item() < -0.07 and loser.grad.item() > 1e-4
    if divergence != "forward_kl" and divergence != "alpha":
        assert loss.item() == pytest.approx(1.313262, abs=1e-6)  # ln(1 + e^(0.1 * 10))


def test_an_offset_is_in_units_of_the_logit_whatever_the_link_multiplies():
    c, utility = random_pairs()
    wanted = F.softplus(0.5 - 2 * (c[:, 0] - c[:, 1]))
    for scale in (1.0, 1024.0):
        link = FDivergence(divergence="reverse_kl", scale=scale)
        objective = Pairwise(beta=2 / scale, link=link, labels=Offset(constant=0.5))
        assert torch.allclose(loss_of(objective, c, utility), wanted, rtol=1e-9)
        logit = objective(*ratios(c, utility), Memory()).metrics["logit"]
        assert torch.allclose(logit, 2 * (c[:, 0] - c[:, 1]) - 0.5, rtol=1e-9)


@pytest.mark.parametrize("labels", LABELERS, ids=str)
def test_of_a_soft_tie_nobody_has_won(labels):
    c = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    utility, soft = torch.full((2, 2), 0.5, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    loss_of(Pairwise(beta=2, labels=labels), c, utility, soft=soft).sum().backward()
    assert c.grad.abs().max() < 1e-12


@pytest.mark.parametrize("count", range(2, 9))
def test_a_group_of_equals_says_nothing(count):
    """Also where the mean of equal float32 numbers is not that number, as with three times 0.11."""
    for value in torch.arange(1, 100) / 100:
        est, batch = ratios(torch.zeros(1, count), value.expand(1, count))
        for objective in (KTO(beta=1), PlackettLuce(beta=1), Pairwise(beta=1), Pairwise(beta=1, pairs=AllPairs())):
            assert objective(est, batch, Memory()).per_group.item() == 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_stay_finite_where_candidates_are_missing(objective):
    c = torch.randn(4, 3, generator=torch.Generator().manual_seed(6), requires_grad=True)
    valid = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, True, False]])
    utility = torch.tensor([[1, 0.5, 0], [1, 0.5, 0], [0.2, 0.2, 0.2], [1, -1, 0]])
    loss = loss_of(objective, c, utility, valid=valid)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(c.grad).all()
    assert (c.grad[~valid] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_order_inside_a_group_does_not_matter(objective):
    g = torch.Generator().manual_seed(2)
    error, reference = torch.rand(6, 4, generator=g), torch.rand(6, 4, generator=g)
    utility = torch.rand(6, 4, generator=g)
    expected = objective(*groups(error, reference, utility), Memory()).per_group
    for _ in range(10):
        p = torch.randperm(4, generator=g)
        assert torch.allclose(objective(*groups(error[:, p], reference[:, p], utility[:, p]), Memory()).per_group, expected,
                              rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [KTO(beta=0.5, baseline=False), SetContrast(beta=1)], ids=str)
@pytest.mark.parametrize("votes", [(1, 3, 5), (2, 3, 4), (3, 4, 4, 5)])
def test_a_picture_at_the_groups_mean_is_not_above_it(objective, votes):
    """Shares n/5: in float32 the mean of 1/5, 3/5, 1 is 3/5 in some orders and a bit less in others. Liked, and in Y+, is what
    is better than it: the last picture of each of these groups."""
    c, places = torch.linspace(-0.4, 0.7, len(votes), dtype=torch.float64), range(len(votes))
    expected = loss_of(objective, c[None], torch.tensor([[0.0] * (len(votes) - 1) + [1.0]]))
    for order in itertools.permutations(places):
        order = list(order)
        found = loss_of(objective, c[None, order], torch.tensor([[votes[i] / 5 for i in order]], dtype=torch.float32))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 2000.0, 1e5])
def test_extremes_stay_finite(link, beta):
    margin = torch.tensor([0, 1e-8, -1e-8, 1, -1, 50, -50, 1e4, -1e4], requires_grad=True)
    loss = link(margin, -margin / 2, beta)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(margin.grad).all()
    if isinstance(link, Logistic):
        mutant = -torch.log(torch.sigmoid(torch.tensor(-50.0 * 5000)))
        assert not torch.isfinite(mutant), "log(sigmoid) must fail where ours does not"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 3), min_size=4, max_size=4), st.floats(0.1, 100), st.floats(-1, 1))
def test_swap_negates_and_constants_cancel(errors, beta, shift):
    e = torch.tensor([errors[:2]], dtype=torch.float64)
    r = torch.tensor([errors[2:]], dtype=torch.float64)
    logit = lambda *a, **k: Pairwise(beta=beta)(*groups(*a, **k), Memory()).metrics["logit"].item()
    z = logit(e, r)
    assert logit(e, r, utility=torch.tensor([[0.0, 1.0]])) == pytest.approx(-z, abs=1e-9)
    assert logit(e + shift, r + shift) == pytest.approx(z, abs=1e-6 * max(1, beta))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(MARGIN_LINKS), st.floats(-2, 2), st.floats(0.01, 1), st.floats(0.5, 20))
def test_links_fall_until_their_minimum(link, margin, step, beta):
    minimum = {Squared: 1 / (2 * beta), Hinge: 1 / beta}.get(type(link), torch.inf)
    if isinstance(link, Logistic) and link.smoothing:
        minimum = torch.logit(torch.tensor(1 - link.smoothing, dtype=torch.float64)).item() / beta
    if margin + step < minimum:
        zero = torch.zeros(1, dtype=torch.float64)
        low, high = (link(zero + m, zero, beta).item() for m in (margin + step, margin))
        assert low <= high + 1e-12


def test_robust_is_unbiased_under_flips():
    # (1-e) * robust(z) + e * robust(-z) = logistic(z), for every z
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    link, zero = Robust(flip=0.3), torch.zeros(11, dtype=torch.float64)
    assert torch.allclose(0.7 * link(z, zero, 1.0) + 0.3 * link(-z, zero, 1.0), Logistic()(z, zero, 1.0))


def test_invalid_candidates_and_ties_give_nothing():
    error = torch.rand(3, 2, requires_grad=True)
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    utility = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    for objective in OBJECTIVES[:4]:
        loss = objective(*groups(error, error.detach(), utility, valid), Memory())
        assert loss.per_group.tolist() == [0, 0, 0]


def test_all_pairs_of_a_pair_is_the_pair():
    error, reference = torch.rand(5, 2), torch.rand(5, 2)
    est, batch = groups(error, reference)
    a, b = (Pairwise(beta=7, pairs=pairs)(est, batch, Memory()).per_group for pairs in (AllPairs(), BestWorst()))
    assert torch.equal(a, b)
