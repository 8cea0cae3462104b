"""SePPO's criterion, beta-DPO, weights, penalties, curriculum: numbers of seppo.md, pso.md and lm_objectives.md."""

from dataclasses import replace

import pytest
import torch

from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference, Probe
from diffalign.objectives import BCO, EasyToHard, Pairwise, PlackettLuce, Regularized
from diffalign.types import Batch, Cond, Estimate, Memory

from .test_likelihood import Linear, batch_of, context


def estimate(change, utility=((1.0, 0.0),), anchor=None, place=None):
    """change: [B, K] error of the policy minus error of the reference; the log-ratio is minus half of it."""
    change = torch.tensor(change, dtype=torch.float64, requires_grad=True)
    base = torch.full_like(change, 0.1).detach()
    est = Estimate(policy=-0.5 * (base + change), reference=-0.5 * base, error=base + change, reference_error=base,
                   t=torch.zeros_like(base), anchor=anchor)
    batch = Batch(x0=torch.zeros(*change.shape, 1), cond=Cond(tokens=torch.zeros(len(change), 1, 1)), place=place,
                  utility=torch.tensor(utility, dtype=torch.float64), valid=torch.ones_like(base, dtype=torch.bool),
                  key=torch.zeros(len(change), 2, dtype=torch.int64))
    return est, batch, change


def loss_and_grad(objective, *args, memory=None, **kwargs):
    est, batch, change = estimate(*args, **kwargs)
    loss = objective(est, batch, memory or Memory())
    loss.per_group.sum().backward()
    return loss, change.grad


# seppo.md check 2: k = 100 on changes, hence beta = 200 here
@pytest.mark.parametrize("change, flip, value", [
    ((-0.02, 0.01), "sign", 0.048587), ((0.02, 0.01), "sign", 3.048587), ((0.02, 0.01), "none", 1.313262),
    ((0.0, 0.01), "sign", 0.693147), ((0.02, 0.01), "indicator", 2.126928)])
def test_anchor_criterion(change, flip, value):
    """sgn +1: 100 (0.02 + 0.01) = 3; sgn -1: -100 (0.02 + 0.01) = -3; sgn 0: the winner alone; indicator: -2."""
    loss, grad = loss_and_grad(Pairwise(beta=200, flip=flip), [change])
    assert loss.per_group.item() == pytest.approx(value, abs=1e-6)
    w, l = grad[0].tolist()
    assert w > 0
    expected = {"none": -1, "indicator": -1 if change[0] < 0 else 0, "sign": (change[0] > 0) - (change[0] < 0)}[flip]
    assert (l > 0) - (l < 0) == expected


def test_criterion_ignores_positive_factors():
    for scale in (1e-3, 1.0, 50.0):
        loss, _ = loss_and_grad(Pairwise(beta=200 / scale, flip="sign"), [[0.02 * scale, 0.01 * scale]])
        assert loss.per_group.item() == pytest.approx(3.048587, abs=1e-6) and loss.metrics["flipped"].item() == 1


def test_loser_scale():
    """PSO's nu: beta (c_w - nu c_l). nu = 1 is DPO, 0 the winner alone, whose loser has no gradient."""
    change = [[-0.02, 0.01]]
    assert loss_and_grad(Pairwise(beta=200, loser_scale=1.0), change)[0].per_group.item() == pytest.approx(0.048587, abs=1e-6)
    loss, grad = loss_and_grad(Pairwise(beta=200, loser_scale=0.1), change)
    assert loss.per_group.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-2.1)).item(), abs=1e-6)
    assert loss_and_grad(Pairwise(beta=200, loser_scale=0.0), change)[1][0, 1] == 0
    # lm_objectives.md section 7, MaPPO with Dr = 1/2: b c_w = 1, b c_l = -1/2 give -log sigmoid(1.25)
    mappo, _ = loss_and_grad(Pairwise(beta=200, loser_scale=0.5), [[-0.01, 0.005]])
    assert mappo.per_group.item() == pytest.approx(0.251929, abs=1e-6)


def test_dynamic_beta():
    """b0 0.1, a 0.6, last mean 2, running mean 1: 0.1 (1 + 0.6) = 0.16 (lm_objectives.md check 4), floored at 1e-3 b0."""
    objective = Pairwise(beta=0.1, dynamic=0.6)
    memory = Memory()
    memory.values = {"pair_logit@0": 2.0, "pair_logit@0.9": 1.0}
    assert objective._beta(memory) == pytest.approx(0.16)
    memory.values["pair_logit@0"] = -100.0
    assert objective._beta(memory) == pytest.approx(1e-4)
    loss, _ = loss_and_grad(Pairwise(beta=200, dynamic=0.6), [[-0.02, 0.01], [0.0, 0.0]], utility=((1.0, 0.0), (1.0, 0.0)))
    assert [x.item() for x in loss.observed["pair_logit@0"]] == pytest.approx([3.0, 2.0])
    memory = Memory()
    for value in (1.0, 3.0):
        memory.update({name: (value, 1.0) for name in ("pair_logit@0", "pair_logit@0.9", "other")})
    assert memory.values == {"pair_logit@0": 3.0, "pair_logit@0.9": pytest.approx(1.2), "other": pytest.approx(1.02)}


def test_on_policy_weights():
    """min(1, exp(a beta (c_w + c_l))), without gradient: c = 0.01 and -0.005, beta 200: exp(a * 1) -> 1; swapped: e^-1."""
    near, _ = loss_and_grad(Pairwise(beta=200, on_policy=1.0), [[-0.02, 0.01]])
    plain, grad = loss_and_grad(Pairwise(beta=200), [[0.02, -0.01]])
    far, far_grad = loss_and_grad(Pairwise(beta=200, on_policy=1.0), [[0.02, -0.01]])
    assert near.per_group.item() == pytest.approx(0.048587, abs=1e-6) and near.metrics["on_policy"].item() == 1
    weight = torch.tensor(-1.0).exp().item()
    assert far.per_group.item() == pytest.approx(weight * plain.per_group.item())
    torch.testing.assert_close(far_grad, weight * grad)


def test_penalties_add_what_they_say():
    inner, change = Pairwise(beta=200), [[0.02, -0.01], [-0.01, 0.0]]
    utility = ((1.0, 0.0), (1.0, 0.0))
    anchor = torch.tensor([[0.2, 0.4], [0.0, 0.0]], dtype=torch.float64)
    plain, grad = loss_and_grad(inner, change, utility=utility)
    full, full_grad = loss_and_grad(Regularized(objective=inner, sft=2.0, winner=3.0, origin=5.0), change, utility=utility,
                                    anchor=anchor)
    added = (full.per_group - plain.per_group).tolist()
    assert added == pytest.approx([2 * 0.12 + 3 * 0.02 + 5 * 0.3, 2 * 0.09 + 0 + 0])
    # d/d error of the winner: sft everywhere, protection where its error has risen; losers are left alone
    assert (full_grad - grad).flatten().tolist() == pytest.approx([5.0, 0.0, 2.0, 0.0])
    none, none_grad = loss_and_grad(Regularized(objective=inner), change, utility=utility)
    assert torch.equal(none.per_group, plain.per_group) and torch.equal(none_grad, grad)


def test_the_distance_from_the_base_is_half_the_mean_square_between_predictions():
    """Linear models 0.3 x_t and 0.2 x_t: 1/2 * 0.01 * mean x_t^2; read from the origin set when the reference moves."""
    batch, model = batch_of(), Linear(policy=0.3, reference=0.25, origin=0.2)
    method = Preference(DenoisingELBO(), Regularized(objective=Pairwise(beta=1), origin=1.0), origin="origin")
    assert method.reads == ("policy", "reference", "origin")
    loss = method.loss(batch, context(model))
    xt = DenoisingELBO().noised(batch, context(model)).xt
    expected = 0.005 * xt.square().flatten(1).mean(1).view(3, 2).mean(1)
    torch.testing.assert_close(loss.metrics["origin_distance"], expected, rtol=1e-4, atol=1e-7)
    assert Preference(DenoisingELBO(), Pairwise(beta=1)).reads == ("policy", "reference")


def test_two_references_are_their_geometric_mean():
    batch = batch_of()
    mixed = DenoisingELBO()(batch, context(Linear(policy=0.3, reference=0.25, origin=0.2)), {"reference": 0.5, "origin": 0.5})
    each = [DenoisingELBO()(batch, context(Linear(policy=0.3, reference=s)), "reference") for s in (0.25, 0.2)]
    torch.testing.assert_close(mixed.reference, (each[0].reference + each[1].reference) / 2)


def test_curriculum_walks_from_the_worst_opponent_to_the_runner_up():
    utility = [[0.1, 0.9, 0.5, 0.3]] * 5
    _, batch, _ = estimate([[0.0] * 4] * 5, utility=utility, place=torch.tensor([0, 9, 10, 25, 1000]))
    b, w, l = EasyToHard(stage=10)(batch)
    assert b.tolist() == [0, 1, 2, 3, 4] and w.tolist() == [1] * 5 and l.tolist() == [0, 0, 3, 2, 2]
    _, pair, _ = estimate([[0.0, 0.0]], utility=((0.0, 1.0),), place=torch.tensor([99]))
    assert [x.tolist() for x in EasyToHard(stage=10)(pair)] == [[0], [1], [0]]
    _, tie, _ = estimate([[0.0, 0.0]], utility=((1.0, 1.0),), place=torch.tensor([0]))
    assert EasyToHard(stage=1)(tie)[0].numel() == 0


@pytest.mark.parametrize("build, words", [
    (lambda: Pairwise(beta=1, reference_free=True, flip="sign"), "flip"),
    (lambda: Pairwise(beta=1, reference_free=True, on_policy=1.0), "on_policy"),
    (lambda: Pairwise(beta=1, centre=True, flip="sign"), "centre"),
    (lambda: Pairwise(beta=1, centre=True, loser_scale=0.1), "centre"),
    (lambda: Pairwise(beta=1, dynamic=-1.0), "dynamic"), (lambda: EasyToHard(stage=0), "stage"),
    (lambda: Regularized(objective=Pairwise(beta=1, reference_free=True), winner=1.0), "winner"),
    (lambda: Regularized(objective=PlackettLuce(beta=1), sft=-1.0), "sft")])
def test_refusals(build, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        build()


@pytest.mark.parametrize("options", [dict(loser_scale=0.1), dict(flip="sign"), dict(flip="indicator", loser_scale=0.5),
                                     dict(flip="sign", link=BCO())], ids=str)
def test_in_the_swapped_order_the_other_one_is_the_loser(options):
    """A soft label's two orders are each the whole objective: of a tie, either picture may come first."""
    objective, change = Pairwise(beta=200, **options), [-0.02, 0.01]
    right, wrong = (loss_and_grad(objective, [change], utility=(order,))[0].per_group.item()
                    for order in ((1.0, 0.0), (0.0, 1.0)))
    for p in (0.5, 0.7, 1.0):
        est, batch, _ = estimate([change])
        soft = replace(batch, soft=torch.tensor([p], dtype=torch.float64))
        assert objective(est, soft, Memory()).per_group.item() == pytest.approx(p * right + (1 - p) * wrong)
    for first in (change, change[::-1]):
        est, batch, _ = estimate([first], utility=((1.0, 1.0),))
        tie = replace(batch, soft=torch.tensor([0.5], dtype=torch.float64))
        assert objective(est, tie, Memory()).per_group.item() == pytest.approx((right + wrong) / 2)


def test_the_share_of_flips_is_of_the_criterion():
    for scale in (0.0, 0.5, 1.0):
        for change, flipped in ((-0.02, 0.0), (0.02, 1.0), (0.0, 0.0)):  # at policy = reference the sign is 0, not -1
            loss, _ = loss_and_grad(Pairwise(beta=200, flip="sign", loser_scale=scale), [[change, 0.01]])
            assert loss.metrics["flipped"].item() == flipped


def test_nested_penalties_reach_the_base():
    inner = Regularized(objective=Pairwise(beta=1), origin=1.0)
    method = Preference(DenoisingELBO(), Regularized(objective=inner, sft=0.0))
    batch, model = batch_of(), Linear(policy=0.3, reference=0.2)
    alone = Preference(DenoisingELBO(), inner).loss(batch, context(model)).per_group
    assert torch.equal(method.loss(batch, context(model)).per_group, alone)


def test_divergence_of_a_fixed_set_of_winners():
    """timestep_aware_dpo.md check 8: 0 for the base itself, blind to losers; strata of uniform times, whatever the batches."""
    batch, model = batch_of(b=5), Linear(current=0.3, origin=0.2)
    probe, ctx = Probe([batch]), context(model)
    assert probe(ctx, "origin") == 0.0 and probe(ctx, "current") == probe(ctx, "current")
    assert max(len(xt) for _, xt, _, _ in model.calls) == 10  # one draw at a time
    times = torch.stack([t.view(5, 2)[:, 0] for name, _, t, _ in model.calls[:8:2]])
    assert ((times * 4).ceil() == torch.tensor([1, 2, 3, 4])[:, None]).all()
    other = replace(batch, x0=torch.cat([batch.x0[:, :1], -7 * batch.x0[:, 1:]], 1))
    assert Probe([other])(ctx, "current") == pytest.approx(probe(ctx, "current"), rel=1e-6)
    halves = [replace(batch, **{n: getattr(batch, n)[part] for n in ("x0", "utility", "valid", "key")},
                      cond=Cond(tokens=batch.cond.tokens[part])) for part in (slice(0, 2), slice(2, 5))]
    assert Probe(halves)(ctx, "current") == pytest.approx(probe(ctx, "current"), rel=1e-6)


def test_seppo_on_its_own_samples_of_the_same_model_pushes_nothing_but_the_winner():
    """seppo.md check 1: at policy = reference the loss is ln 2 and the loser has no gradient."""
    loss, grad = loss_and_grad(Pairwise(beta=200, flip="sign"), [[0.0, 0.0]])
    assert loss.per_group.item() == pytest.approx(0.693147, abs=1e-6) and grad.flatten().tolist() == pytest.approx([50.0, 0.0])
