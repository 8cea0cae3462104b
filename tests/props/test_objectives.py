"""Properties of links and objectives: gradients, extremes, antisymmetry, invariance to the order inside a group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives import (
    BCO,
    DCG,
    EXO,
    KTO,
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
from diffalign.types import Batch, Cond, Estimate, Memory

MARGIN_LINKS = [Logistic(), Logistic(smoothing=0.2), Robust(flip=0.2), Squared(), Hinge()]
LINKS = [*MARGIN_LINKS, EXO(epsilon=0.1), DiscoPOP(), NCA(), BCO(), SPPO(), APOZero(), APODown(),
         *[FDivergence(divergence=name) for name in ("reverse_kl", "forward_kl", "js", "alpha")]]
OBJECTIVES = [*[Pairwise(beta=b, link=link) for link in LINKS for b in (1.0, 50.0)], Pairwise(beta=3, pairs=AllPairs()),
              Pairwise(beta=3, reference_free=True), MaPO(), MaPOAAAI(), SFT(),
              Regularized(objective=Pairwise(beta=5), sft=0.3), KTO(beta=3), ORPO(), PlackettLuce(beta=2),
              SetContrast(beta=2, alpha=0.1),
              *[Pairwise(beta=3, pairs=AllPairs(), labels=x) 
                for x in (DCG(), SoftMargin(), SoftTarget(), Offset(constant=0.2, alpha=0.5))]]


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
    error = torch.rand(64, 3, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.rand(64, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: objective(*groups(e, reference), Memory()).per_group, error)


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
