"""Golden numbers of the MaPO card, section 9."""

import math

import pytest
import torch

from diffalign.objectives import SFT, MaPO, MaPOAAAI, Pairwise, Regularized
from diffalign.objectives.mapo import odds
from diffalign.types import Memory

from .test_links import loss_and_grad, pair


@pytest.mark.parametrize("e_w, e_l, logit, value, grads", [
    (0.1, 0.1, 0.0, 0.169315, (13.2917, -12.2917)),          # check 1: 0.1 + 0.1 * ln 2
    (0.100, 0.104, 0.983001, 0.131786, (7.69397, -6.68943)),  # check 2
    (0.104, 0.100, -0.983001, 0.234086, (18.8773, -17.8894)),  # check 3, swapped
    (0.30, 0.31, 2.373015, 0.308911, (3.02486, -2.02131)),    # check 4
])
def test_variant_code(e_w, e_l, logit, value, grads):
    loss, grad = loss_and_grad(MaPO(), e_w, e_l)
    assert loss.metrics["logit"].item() == pytest.approx(logit, abs=1e-6)
    assert loss.per_group.item() == pytest.approx(value, abs=1e-6)
    assert grad == pytest.approx(grads, rel=1e-5)


@pytest.mark.parametrize("horizon, value", [(1.0, 0.8642538271149682), (1000.0, 0.8)])
def test_reliability_values(horizon, value):
    # odds(0.4) = 0.8133... the table's 0.6527729767, 0.5488567249 are odds at s = 1: x = 0.8, 1.1
    loss, _ = loss_and_grad(MaPO(beta=0.1, horizon=horizon, snr=1.0), 0.80, 1.10)
    assert odds(torch.tensor(0.8, dtype=torch.float64)).item() == pytest.approx(0.6527729767, abs=1e-9)
    assert loss.per_group.item() == pytest.approx(value, abs=1e-8)


def test_variant_aaai():
    # check 5, beta 8: phi = 0.668090, 0.657306; loss 0.185971
    loss, grad = loss_and_grad(MaPOAAAI(beta=8), 0.100, 0.104)
    phi = odds(torch.tensor([0.100, 0.104], dtype=torch.float64)) ** 8
    assert phi.tolist() == pytest.approx([0.668090, 0.657306], abs=1e-6)
    assert loss.per_group.item() == pytest.approx(0.185971, abs=1e-6)
    assert grad == pytest.approx((1.16889, -0.166273), rel=1e-5)


def test_check_6_odds_are_finite_and_fall():
    # f of check 2: s * l = 0.05 and 0.052
    assert odds(torch.tensor([0.05, 0.052], dtype=torch.float64)).tolist() == pytest.approx([0.975208, 0.974225], abs=1e-6)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0, 1e-8, 1e-4, 1e-3, 0.5, 1, 50, 1000], dtype=dtype, requires_grad=True)
        y = odds(x)
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
        assert y[0] == 1 and (y.diff() <= 0).all() and y[5].item() == pytest.approx(0.581977, abs=1e-6)
        assert x.grad[0].item() == pytest.approx(-0.5)
    naive = torch.tensor(1e-8)
    assert not torch.isfinite(naive / (torch.exp(naive) - 1)), "the released formula fails where ours must not"


def test_check_7_limiting_cases():
    # beta 0 is SFT on winners
    mapo, _ = loss_and_grad(MaPO(beta=0.0), 0.3, 0.31)
    sft, _ = loss_and_grad(SFT(), 0.3, 0.31)
    assert mapo.per_group.item() == sft.per_group.item() == pytest.approx(0.3)
    # without ell_w and at small errors: reference-free Diffusion-DPO with kappa 250 (beta_code 500)
    _, ours = loss_and_grad(MaPO(beta=1.0), 1.0e-3, 1.1e-3)
    _, dpo = loss_and_grad(Pairwise(beta=500, reference_free=True), 1.0e-3, 1.1e-3)
    assert ours[0] - 1 == pytest.approx(dpo[0], rel=1e-3)
    assert ours[1] == pytest.approx(dpo[1], rel=1e-3)


def test_check_9_signs_everywhere():
    for e_w in (1e-6, 0.1, 1.0, 3.0):
        for e_l in (1e-6, 0.1, 1.0, 3.0):
            _, grad = loss_and_grad(MaPO(), e_w, e_l)
            assert grad[0] >= 1 and grad[1] <= 0


def test_anchor_adds_the_winners_error():
    # ln 2 + 0.5 * 0.1; gradient of the winner 1250 + 0.5
    loss, grad = loss_and_grad(Regularized(objective=Pairwise(beta=5000), sft=0.5), 0.1, 0.2, 0.1, 0.2)
    assert loss.per_group.item() == pytest.approx(math.log(2) + 0.05)
    assert grad == pytest.approx([1250.5, -1250])


def test_sft_takes_the_best_candidate():
    est, batch = pair(0.3, 0.7, utility=(0.0, 1.0))
    assert SFT()(est, batch, Memory()).per_group.item() == pytest.approx(0.7)
