"""Golden numbers of RELIABILITY section 4 and the Diffusion-DPO card, with their arithmetic.

Inputs: policy errors e_w = 0.80, e_l = 1.10; reference errors 0.90, 1.00. Log-ratios -(0.80-0.90)/2 = 0.05 and
-(1.10-1.00)/2 = -0.05, so the margin is 0.10.
"""

import math

import pytest
import torch

from diffalign.objectives import Hinge, Logistic, Pairwise, Robust, Squared
from diffalign.types import Batch, Cond, Estimate, Memory


def pair(e_w, e_l, r_w=None, r_l=None, utility=(1.0, 0.0), soft=None, dtype=torch.float64):
    """One pair's estimate from its four errors, and its batch."""
    error = torch.tensor([[e_w, e_l]], dtype=dtype, requires_grad=True)
    reference = None if r_w is None else torch.tensor([[r_w, r_l]], dtype=dtype)
    est = Estimate(policy=-error / 2, reference=None if reference is None else -reference / 2, error=error,
                   reference_error=reference, t=torch.tensor([[0.5, 0.5]]))
    batch = Batch(x0=torch.zeros(1, 2, 1), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([utility]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64),
                  soft=None if soft is None else torch.tensor([soft], dtype=dtype))
    return est, batch


def loss_and_grad(objective, *errors, **kwargs):
    est, batch = pair(*errors, **kwargs)
    loss = objective(est, batch, Memory())
    loss.per_group.sum().backward()
    return loss, est.error.grad[0].tolist()


@pytest.mark.parametrize("link, value", [
    (Logistic(), 0.5981388693815918),                 # ln(1 + exp(-2 * 0.1))
    (Logistic(smoothing=0.1), 0.6181388693815918),    # 0.9 * ln(1+e^-0.2) + 0.1 * ln(1+e^0.2)
    (Robust(flip=0.1), 0.5731388693815918),           # (0.9 * ln(1+e^-0.2) - 0.1 * ln(1+e^0.2)) / 0.8
    (Squared(), 0.0225),                              # (0.1 - 1/4)^2
    (Hinge(), 0.8),                                   # 1 - 2 * 0.1
])
def test_links_at_the_golden_margin(link, value):
    loss, _ = loss_and_grad(Pairwise(beta=2, link=link), 0.80, 1.10, 0.90, 1.00)
    assert loss.per_group.item() == pytest.approx(value, abs=1e-9)


def test_logistic_gradient_in_the_winners_error():
    # beta/2 * sigmoid(-0.2) = 1 * 0.45016600268752216
    _, grad = loss_and_grad(Pairwise(beta=2), 0.80, 1.10, 0.90, 1.00)
    assert grad == pytest.approx([0.45016600268752216, -0.45016600268752216], abs=1e-12)


def test_card_check_1_policy_equals_reference():
    # z = 0, loss = ln 2, dL/d ell_w = kappa/2 = 5000/4 = 1250
    loss, grad = loss_and_grad(Pairwise(beta=5000), 0.1, 0.2, 0.1, 0.2)
    assert loss.per_group.item() == pytest.approx(math.log(2), abs=1e-12)
    assert grad == pytest.approx([1250, -1250])


def test_card_check_2_scalars():
    # z = -2500 * ((0.1000-0.1200) - (0.1002-0.1198)) = -2500 * (-0.0004) = 1; loss = ln(1 + e^-1) = 0.313262
    # gradient = 2500 * sigmoid(-1) = 2500 * 0.268941 = 672.35
    loss, grad = loss_and_grad(Pairwise(beta=5000), 0.1000, 0.1200, 0.1002, 0.1198)
    assert loss.metrics["logit"].item() == pytest.approx(1.0, abs=1e-9)
    assert loss.per_group.item() == pytest.approx(0.313262, abs=1e-6)
    assert grad == pytest.approx([672.35, -672.35], abs=0.01)
    # a script without the factor 1/2: the same numbers with twice the beta, z = 2
    twice, _ = loss_and_grad(Pairwise(beta=10000), 0.1000, 0.1200, 0.1002, 0.1198)
    assert twice.per_group.item() == pytest.approx(0.126928, abs=1e-6)


def test_card_check_3_and_4_tensors_and_sum_convention():
    # errors 0.0100, 0.1475 | 0.0400, 0.0825; beta_code 10 -> z = -5 * (-0.1375 + (-0.0425 -> 0.0425)) = 0.475
    eps = torch.tensor([1, 0, -1, 0.5], dtype=torch.float64)
    w = torch.tensor([0.9, 0.1, -1.1, 0.4], dtype=torch.float64, requires_grad=True)
    l = torch.tensor([0.5, 0.3, -0.6, 0.2], dtype=torch.float64, requires_grad=True)
    rw = torch.tensor([0.8, 0.2, -1.2, 0.3], dtype=torch.float64)
    rl = torch.tensor([0.6, 0.2, -0.7, 0.3], dtype=torch.float64)
    mean = lambda p: (eps - p).square().mean()
    assert [round(mean(p).item(), 4) for p in (w, l, rw, rl)] == [0.0100, 0.1475, 0.0400, 0.0825]
    _, batch = pair(0, 0)
    error = torch.stack([mean(w), mean(l)])[None]
    ref = torch.stack([mean(rw), mean(rl)])[None]
    est = Estimate(policy=-error / 2, reference=-ref / 2, error=error, reference_error=ref, t=torch.zeros(1, 2))
    loss = Pairwise(beta=10)(est, batch, Memory())
    loss.per_group.sum().backward()
    assert loss.metrics["logit"].item() == pytest.approx(0.475)
    assert loss.per_group.item() == pytest.approx(0.483589, abs=1e-6)
    assert w.grad.tolist() == pytest.approx([-0.095858, 0.095858, -0.095858, -0.095858], abs=1e-6)
    assert l.grad.tolist() == pytest.approx([0.479292, -0.287575, -0.383434, 0.287575], abs=1e-6)
    # Eq. 14 with summed errors: beta_eq14 = beta_code / (2 D) = 10 / 8 = 1.25
    from diffalign.likelihood import implied_nats
    assert implied_nats(10, elements=4)["beta_eq14"] == 1.25
    z14 = -1.25 * 4 * ((mean(w) - mean(rw)) - (mean(l) - mean(rl)))
    assert z14.item() == pytest.approx(0.475)


def test_card_check_5_swap():
    # loss(z) - loss(-z) = -z
    loss, _ = loss_and_grad(Pairwise(beta=10), 0.0100, 0.1475, 0.0400, 0.0825)
    swapped, _ = loss_and_grad(Pairwise(beta=10), 0.0100, 0.1475, 0.0400, 0.0825, utility=(0.0, 1.0))
    assert swapped.metrics["logit"].item() == pytest.approx(-0.475)
    assert (loss.per_group - swapped.per_group).item() == pytest.approx(-0.475)


def test_card_check_6_limits():
    # small kappa: gradient -> kappa/2 * (grad ell_w - grad ell_l); large z: gradient -> 0
    _, small = loss_and_grad(Pairwise(beta=1e-6), 0.1, 0.3, 0.2, 0.2)
    assert small == pytest.approx([0.25e-6, -0.25e-6], rel=1e-6)
    _, large = loss_and_grad(Pairwise(beta=1e5), 0.1, 0.3, 0.2, 0.2)
    assert abs(large[0]) < 1e-300 or large[0] == 0


def test_card_check_8_a_tie_gives_no_pair_rather_than_a_win():
    loss, grad = loss_and_grad(Pairwise(beta=10), 0.1, 0.3, 0.2, 0.2, utility=(1.0, 1.0))
    assert loss.per_group.tolist() == [0.0]
    assert grad == [0.0, 0.0]


def test_soft_labels_average_both_orders():
    # p * ln(1+e^-z) + (1-p) * ln(1+e^z) at z = 0.2 (beta 2, margin 0.1), p = 0.7: 0.6581388693815918
    loss, _ = loss_and_grad(Pairwise(beta=2), 0.80, 1.10, 0.90, 1.00, soft=0.7)
    assert loss.per_group.item() == pytest.approx(0.6581388693815918, abs=1e-9)
    tie, grad = loss_and_grad(Pairwise(beta=2), 0.90, 1.00, 0.90, 1.00, utility=(1.0, 1.0), soft=0.5)
    assert tie.per_group.item() == pytest.approx(math.log(2))
    assert grad == pytest.approx([0.0, 0.0])


def test_reference_free_compares_the_policy_alone():
    # margin = -(0.80 - 1.10)/2 = 0.15; ln(1 + exp(-0.3)) = 0.5543552444685272
    loss, _ = loss_and_grad(Pairwise(beta=2, reference_free=True), 0.80, 1.10)
    assert loss.per_group.item() == pytest.approx(0.5543552444685272, abs=1e-9)


@pytest.mark.parametrize("beta", [0, -1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        Pairwise(beta=beta)
