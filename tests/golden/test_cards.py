"""Checks of notation.md section 8 and of the two method cards that no other file covers, and what derives from them."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffalign import rng
from diffalign.evaluate.statistics import bootstrap, paired, prompts_needed
from diffalign.likelihood import ELBO, DenoisingELBO, MinSNR, implied_nats
from diffalign.methods import Preference
from diffalign.methods.health import health
from diffalign.objectives import SFT, Hinge, Logistic, MaPO, MaPOAAAI, Pairwise, Regularized, Robust, Squared
from diffalign.process import X0, Discrete, Eps, LogitNormal, Random, RectifiedFlow, Uniform, V, VariancePreserving, Velocity
from diffalign.types import Batch, Cond, Estimate, Memory, Noised

from .test_likelihood import Linear, batch_of, context, gaussian_error, noised_at, sd_process, true_log_ratio
from .test_links import loss_and_grad, pair

TRUTH = [(0.0, -0.405465), (0.7, -0.269354), (2.0, 0.705646)]


def difference(x0, alpha, sigma):
    """Policy's minus reference's expected squared error of the noise, s 1.5 against 1.0."""
    alpha, sigma = alpha.double(), sigma.double()
    return gaussian_error(x0, 1.5, alpha, sigma) - gaussian_error(x0, 1.0, alpha, sigma)


# --- notation.md section 8 -------------------------------------------------------------------------------------------

def cosine_process(steps):
    """abar = cos^2(pi t / 2): lambda = 2 log cot(pi t / 2). The last step ends just before 1, where alpha would be 0."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1)
    return VariancePreserving((torch.cos(math.pi * t / 2) ** 2).float())


@pytest.mark.parametrize("x0, value", TRUTH)
def test_check_2_cosine_schedule_converges_to_the_true_log_ratio(x0, value):
    # the sum over T steps is a Riemann sum of the integral over log-SNR: its error falls like 1/T
    errors = []
    for steps in (500, 2000):
        process = cosine_process(steps)
        n = noised_at(process, process.grid())
        for param in (Eps(), V()):
            weight = 0.5 * ELBO(normalise=False, max=None)(n, param, process).double()
            native = difference(x0, n.alpha, n.sigma) / param.error_to_eps(n).double()
            ours = -(weight * native).mean().item()
        errors.append(abs(ours - value))
        assert ours == pytest.approx(value, rel=0.02)
    assert true_log_ratio(x0) == pytest.approx(value, abs=1e-6)
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("x0, velocity, eps", [(0.0, -0.39270, -0.08916), (0.7, -0.26442, -0.05931), (2.0, 0.65450, 0.15453)])
def test_check_3_unit_weights_on_a_flow(x0, velocity, eps):
    process = RectifiedFlow(t_min=1e-6, steps=20_000)
    n = noised_at(process, process.grid())
    delta = difference(x0, n.alpha, n.sigma)
    assert -(delta / Velocity().error_to_eps(n).double()).mean().item() == pytest.approx(velocity, abs=2e-5)
    assert -delta.mean().item() == pytest.approx(eps, abs=2e-5)


@pytest.mark.parametrize("param, process", [(Eps(), sd_process()), (X0(), sd_process()), (V(), sd_process()),
                                            (Eps(), RectifiedFlow()), (X0(), RectifiedFlow()), (Velocity(), RectifiedFlow())])
def test_check_4_conversions_round_trip_at_every_time(param, process):
    grid = process.grid()
    alpha = process.coefficients(grid)[0].double()
    vp = isinstance(process, VariancePreserving)
    sigma = (1 - alpha**2).sqrt() if vp else 1 - alpha
    g = torch.Generator().manual_seed(0)
    x0, noise, raw = (torch.randn(len(grid), 3, 2, generator=g, dtype=torch.float64) for _ in range(3))
    view = lambda c: c.view(-1, 1, 1)
    n = Noised(x0=x0, xt=view(alpha) * x0 + view(sigma) * noise, noise=noise, t=grid, alpha=alpha, sigma=sigma,
               log_snr=2 * (alpha.log() - sigma.log()))
    torch.testing.assert_close(param.to_x0(param.target(n), n), x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(param.to_eps(param.target(n), n), noise, atol=1e-6, rtol=1e-6)
    # whatever is predicted, its two readings belong to one x_t, and the errors convert by the factor of section 2
    again = view(alpha) * param.to_x0(raw, n) + view(sigma) * param.to_eps(raw, n)
    torch.testing.assert_close(again, n.xt, atol=1e-8, rtol=1e-8)
    native, in_eps = (param.target(n) - raw).square(), (noise - param.to_eps(raw, n)).square()
    torch.testing.assert_close(native * view(param.error_to_eps(n)), in_eps, atol=1e-6, rtol=1e-6)
    in_x0 = (x0 - param.to_x0(raw, n)).square()
    torch.testing.assert_close(in_x0 * view((alpha / sigma) ** 2), in_eps, atol=1e-6, rtol=1e-6)


def test_check_5_every_source_gives_the_same_logit():
    """One pair's mean-reduced errors through each formula of the kappa table, D = 16384, beta_code 5000."""
    d, beta = 16384, 5000.0
    w, l, rw, rl = 0.1000, 0.1200, 0.1002, 0.1198
    inside = (w - rw) - (l - rl)          # mean-reduced
    other = implied_nats(beta, d)
    assert other["kappa"] == 2500 and other["beta_eq14"] == pytest.approx(0.15259, abs=1e-5)
    assert implied_nats(2000, 65536)["beta_eq14"] == pytest.approx(0.01526, abs=1e-5)
    logits = {
        "ours": loss_and_grad(Pairwise(beta=beta), w, l, rw, rl)[0].metrics["logit"].item(),
        "train.py": -0.5 * beta * ((w - l) - (rw - rl)),
        "diffusers SD1.x, no half, 2500": -2500 * inside,
        "Eq. 14 and S9, sums": -other["beta_eq14"] * d * inside,
        "Eq. 46, sums and half": -other["beta_eq46"] / 2 * d * inside}
    assert list(logits.values()) == pytest.approx([1.0] * 5, abs=1e-9)


def test_check_6_tiling_leaves_the_logit_and_multiplies_the_summed_one_by_four():
    small = batch_of(b=2)
    big = Batch(x0=small.x0.repeat(1, 1, 1, 2, 2), cond=small.cond, utility=small.utility, valid=small.valid, key=small.key)

    class Tiled:
        """The small batch's noise, tiled like the big one's latents."""

        def draw(self, batch, ctx, keys, t):
            n = DenoisingELBO().noise.draw(small, ctx, keys, t)
            factor = batch.x0.shape[-1] // small.x0.shape[-1]
            return ctx.process.noise(n.x0.repeat(1, 1, factor, factor), n.t, n.noise.repeat(1, 1, factor, factor))

    model = Linear(policy=0.3, reference=0.2)
    logits = [Preference(DenoisingELBO(noise=Tiled()), Pairwise(beta=50)).loss(b, context(model)).metrics["logit"]
              for b in (small, big)]
    assert logits[0].abs().min() > 1e-3
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-6)
    # at fixed beta_eq14 the summed convention is 4 times stronger on 4 times the elements
    assert implied_nats(50, 4 * 64)["beta_eq14"] * 4 == implied_nats(50, 64)["beta_eq14"]


@pytest.mark.parametrize("param, process", [(Eps(), sd_process()), (V(), sd_process()), (Velocity(), RectifiedFlow())])
def test_elbo_estimate_is_unbiased(param, process):
    """The estimator itself, uniform times, true nats: within 4 standard errors of the sum (or integral) it samples."""
    x0, draws = 0.7, 4096

    def predict(name, xt, t, cond):
        s = {"policy": 1.5, "reference": 1.0}[name]
        alpha, sigma = (c.view(-1, 1) for c in process.coefficients(t))
        eps = sigma * xt / (alpha**2 * s**2 + sigma**2)
        x = (xt - sigma * eps) / alpha
        return {"Eps": eps, "V": alpha * eps - sigma * x, "Velocity": eps - x}[type(param).__name__]

    batch = Batch(x0=torch.full((1, 1, 64), x0), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.ones(1, 1),
                  valid=torch.ones(1, 1, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64))
    estimator = DenoisingELBO(weighting=ELBO(normalise=False, max=None), draws=draws)
    ctx = context(predict, process, param)
    est = estimator(batch, ctx, "reference")
    n = estimator.noised(batch, ctx)
    weight = estimator.weighting(n, param, process)
    errors = [(param.target(n) - predict(name, n.xt, n.t, None)).square().mean(1) for name in ("policy", "reference")]
    spread = (-0.5 * weight * (errors[0] - errors[1])).std().item() / draws**0.5
    truth = -0.27196 if isinstance(process, VariancePreserving) else -0.269354
    assert spread < 0.05 and est.log_ratio.item() == pytest.approx(truth, abs=4 * spread)


def test_clamped_elbo_means_the_same_for_every_prediction():
    """``max`` cuts the weight of the noise error, T*gamma > 100 in the first steps only, whatever the model predicts."""
    process = sd_process()
    n = noised_at(process, process.grid())
    expected = process.elbo_weight(process.grid()).clamp(max=100)
    assert (expected == 100).sum() < 10
    for param in (Eps(), V(), X0()):
        weight = 0.5 * ELBO(normalise=False, max=100)(n, param, process) / param.error_to_eps(n)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", [ELBO(), ELBO(normalise=False, max=None), MinSNR()])
def test_weights_of_one_model_in_two_spaces_give_one_estimate(weighting):
    """An eps-model and the v-model that says the same: equal log-ratios under every weighting but 'simple'."""
    process, batch = sd_process(), batch_of()

    def as_v(name, xt, t, cond):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in process.coefficients(t))
        eps = eps_model(name, xt, t, cond)
        return alpha * eps - sigma * (xt - sigma * eps) / alpha

    eps_model = Linear(policy=0.3, reference=0.2)
    one = DenoisingELBO(weighting=weighting)(batch, context(eps_model, process, Eps()), "reference")
    two = DenoisingELBO(weighting=weighting)(batch, context(as_v, process, V()), "reference")
    scale = 1.0
    if isinstance(weighting, ELBO) and weighting.normalise:  # each space is divided by its own mean
        n = noised_at(process, process.grid())
        raw = ELBO(normalise=False)
        scale = (raw(n, Eps(), process).mean() / raw(n, V(), process).mean()).item()
    torch.testing.assert_close(one.log_ratio * scale, two.log_ratio, rtol=1e-3, atol=1e-5)


def test_half_precision_predictions_are_reduced_in_float32():
    """notation.md section 7: an fp16 mean near 0.12 is off by 3e-5, which is 0.08 of logit at kappa 2500."""
    model = Linear(policy=0.3, reference=0.2)
    half = lambda *args: model(*args).bfloat16()
    est = DenoisingELBO()(batch_of(), context(half), "reference")
    n = DenoisingELBO().noised(batch_of(), context(model))
    expected = (n.noise - (0.3 * n.xt).bfloat16().float()).square().flatten(1).mean(1).view(3, 2)
    assert est.error.dtype == est.policy.dtype == torch.float32
    assert torch.equal(est.error, expected)


def test_discrete_times_are_the_distilled_models_steps():
    """SDXL-Turbo: t -> 250 (t mod 4) + 249, each as often."""
    process, times = sd_process(), Discrete(timesteps=(249, 499, 749, 999))
    keys = torch.stack([torch.arange(2000), torch.zeros(2000, dtype=torch.int64)], 1)
    found, counts = process.timestep(process.snap(times.at(Random().draw(0, keys, None)))).unique(return_counts=True)
    assert found.tolist() == [249, 499, 749, 999]
    assert (counts - 500).abs().max() < 4 * (2000 * 0.25 * 0.75) ** 0.5


def test_logit_normal_has_its_density():
    """P(t < 1/2) is Phi(-mean/std); with mean -1, std 2: Phi(0.5) = 0.6915. A negative mean leans to clean, t = 0."""
    keys = torch.arange(4000)[:, None]
    t = LogitNormal(mean=-1.0, std=2.0).at(Random().draw(0, keys, None))
    assert (t < 0.5).double().mean().item() == pytest.approx(0.6915, abs=4 * (0.69 * 0.31 / 4000) ** 0.5)
    assert Uniform(low=0.25, high=0.5).at(Random().draw(0, keys, None)).min() >= 0.25


# --- keyed randomness ------------------------------------------------------------------------------------------------

def test_no_two_purposes_share_a_stream():
    purposes = ("noise", "time", "posterior", "flip", "caption_dropout", "order", "crop", "validation", "dropout", "lora",
                "heldout", "bootstrap", "grid", "check", "sample|a prompt", "sample|a prompt|0", "sample|")
    assert len({rng.integer(0, purpose, 1, 2) for purpose in purposes}) == len(purposes)
    # neither do keys that read alike, nor a prompt that ends like a key
    assert len({rng.integer(0, "p", *key) for key in ((1, 23), (12, 3), (1, 2, 3), (123,), (-1, 23))}) == 5
    assert rng.integer(0, "sample|a", 1) != rng.integer(0, "sample|a|1", 1) != rng.integer(0, "sample|a|1,1")


# --- Diffusion-DPO, section 9 ----------------------------------------------------------------------------------------

def test_dpo_check_2_and_3_hold_in_float32():
    loss, grad = loss_and_grad(Pairwise(beta=10), 0.0100, 0.1475, 0.0400, 0.0825, dtype=torch.float32)
    assert loss.per_group.item() == pytest.approx(0.483589, abs=1e-6) and loss.per_group.dtype == torch.float32
    assert grad == pytest.approx([5 / (1 + math.exp(0.475)), -5 / (1 + math.exp(0.475))], rel=1e-6)


@pytest.mark.parametrize("objective", [MaPO(), MaPOAAAI(), Pairwise(beta=10)], ids=str)
def test_dpo_check_8_a_soft_tie_is_no_win_for_the_first(objective):
    """At probability one half neither picture is preferred: swapping the two changes nothing, and the loss is the mean of
    both orders."""
    tie = dict(utility=(0.5, 0.5), soft=0.5)
    loss, grad = loss_and_grad(objective, 0.1, 0.3, 0.2, 0.2, **tie)
    swapped, swapped_grad = loss_and_grad(objective, 0.3, 0.1, 0.2, 0.2, **tie)
    assert loss.per_group.item() == pytest.approx(swapped.per_group.item())
    assert grad == pytest.approx(swapped_grad[::-1])
    orders = [loss_and_grad(objective, 0.1, 0.3, 0.2, 0.2, utility=u)[0].per_group.item() for u in ((1.0, 0.0), (0.0, 1.0))]
    assert loss.per_group.item() == pytest.approx(sum(orders) / 2)


@pytest.mark.parametrize("objective", [MaPO(), MaPOAAAI(), Pairwise(beta=10)], ids=str)
def test_soft_labels_average_the_losses_of_both_orders(objective):
    soft, _ = loss_and_grad(objective, 0.1, 0.3, 0.2, 0.2, soft=0.7)
    certain, _ = loss_and_grad(objective, 0.1, 0.3, 0.2, 0.2, soft=1.0)
    orders = [loss_and_grad(objective, 0.1, 0.3, 0.2, 0.2, utility=u)[0].per_group.item() for u in ((1.0, 0.0), (0.0, 1.0))]
    assert soft.per_group.item() == pytest.approx(0.7 * orders[0] + 0.3 * orders[1])
    assert certain.per_group.item() == pytest.approx(orders[0])


@pytest.mark.parametrize("soft", [None, 0.5])
def test_dpo_check_8_a_tie_has_no_winner_to_fine_tune_on(soft):
    for utility in ((0.5, 0.5), (1.0, 1.0), (0.0, 0.0)):
        loss, grad = loss_and_grad(SFT(), 0.1, 0.3, 0.2, 0.2, utility=utility, soft=soft)
        assert loss.per_group.tolist() == [0.0] and grad == [0.0, 0.0]
        anchored, _ = loss_and_grad(Regularized(objective=Pairwise(beta=10), sft=1.0), 0.1, 0.3, 0.2, 0.2, utility=utility,
                                    soft=soft)
        bare, _ = loss_and_grad(Pairwise(beta=10), 0.1, 0.3, 0.2, 0.2, utility=utility, soft=soft)
        assert torch.equal(anchored.per_group, bare.per_group)


def test_sft_on_single_pictures_takes_the_liked_ones():
    error = torch.tensor([[0.1], [0.2]])
    batch = Batch(x0=torch.zeros(2, 1, 1), cond=Cond(tokens=torch.zeros(2, 1, 1)), utility=torch.tensor([[1.0], [-1.0]]),
                  valid=torch.ones(2, 1, dtype=torch.bool), key=torch.zeros(2, 2, dtype=torch.int64))
    est = Estimate(policy=-error / 2, reference=None, error=error, reference_error=None, t=torch.zeros(2, 1))
    assert SFT()(est, batch, Memory()).per_group.tolist() == pytest.approx([0.1, 0.0])


def test_accuracy_of_training_leaves_ties_out():
    """A soft tie can be ordered neither right nor wrong; its margin has the sign of whichever picture came first."""
    est, batch = pair(0.1, 0.3, 0.2, 0.2, utility=(0.5, 0.5), soft=0.5)
    metrics = health(est, batch)
    assert all(len(values) == 0 for values in metrics.values())
    est, batch = pair(0.1, 0.3, 0.2, 0.2, soft=0.7)
    assert health(est, batch)["accuracy"].tolist() == [1.0]


def test_dpo_check_9_overfitting_one_pair():
    """50 steps on one pair and one draw: z rises, the error gap falls below the reference's, and we see which side moved."""
    batch, weight = batch_of(b=1), torch.full((4,), 0.2, requires_grad=True)

    def predict(name, xt, t, cond):
        scale = weight if name == "policy" else torch.full((4,), 0.2)
        return scale.view(1, 4, 1, 1) * xt

    method, optimizer = Preference(DenoisingELBO(), Pairwise(beta=50)), torch.optim.SGD([weight], lr=1e-3)
    seen = []
    for _ in range(50):
        loss = method.loss(batch, context(predict))
        optimizer.zero_grad()
        loss.per_group.sum().backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in loss.metrics.items() if value.numel() == 1})
    first, last = seen[0], seen[-1]
    assert first["logit"] == 0.0 and first["accuracy"] == 0.5
    assert all(b["logit"] > a["logit"] for a, b in zip(seen, seen[1:], strict=False)) and last["accuracy"] == 1.0
    assert last["win_error"] - last["lose_error"] < first["win_error"] - first["lose_error"]
    assert last["win_error_change"] < last["lose_error_change"]
    assert last["margin"] == pytest.approx(-(last["win_error_change"] - last["lose_error_change"]) / 2, rel=1e-3)


# --- online DPO and music, sections 7 and 8 --------------------------------------------------------------------------

def test_online_dpo_check_1():
    """Errors .30 | .32 and .40 | .38: changes -.02 and +.02, logit 100/2 * .04 = 2, weight sigmoid(-2) = .119203."""
    loss, grad = loss_and_grad(Pairwise(beta=100), 0.30, 0.40, 0.32, 0.38)
    assert loss.metrics["logit"].item() == pytest.approx(2.0) and loss.per_group.item() == pytest.approx(0.126928, abs=1e-6)
    assert grad == pytest.approx([50 * 0.119203, -50 * 0.119203], rel=1e-5)
    saturated, _ = loss_and_grad(Pairwise(beta=2000), 0.30, 0.40, 0.32, 0.38)
    assert saturated.per_group.item() == pytest.approx(math.exp(-40), rel=1e-9)


def test_online_dpo_check_6_a_flow_by_hand():
    """x0 = 1 and -1, noise .2, t = .5: x_t = .6 and -.4, targets noise - x0 = -.8 and 1.2; at v = 0 errors .64 and 1.44.
    dL/dv_w = (beta/4) 2 (0 + .8) = +1.6 beta/4, dL/dv_l = -(beta/4) 2 (0 - 1.2) = +2.4 beta/4."""
    seen, v = [], torch.zeros(2, 1, requires_grad=True)

    class Fixed:
        forwards = 0

        def draw(self, batch, ctx, keys, t):
            return ctx.process.noise(batch.x0.flatten(0, 1), torch.full((2,), 0.5), torch.full((2, 1), 0.2))

    def predict(name, xt, t, cond):
        seen.append(xt)
        return v if name == "policy" else torch.zeros(2, 1)

    batch = Batch(x0=torch.tensor([[[1.0], [-1.0]]]), cond=Cond(tokens=torch.zeros(1, 1, 1)),
                  utility=torch.tensor([[1.0, 0.0]]), valid=torch.ones(1, 2, dtype=torch.bool),
                  key=torch.zeros(1, 2, dtype=torch.int64))
    loss = Preference(DenoisingELBO(noise=Fixed()), Pairwise(beta=100)).loss(
        batch, context(predict, RectifiedFlow(), Velocity()))
    loss.per_group.sum().backward()
    assert seen[0].flatten().tolist() == pytest.approx([0.6, -0.4])
    assert (loss.metrics["win_error"].item(), loss.metrics["lose_error"].item()) == pytest.approx((0.64, 1.44))
    assert loss.per_group.item() == pytest.approx(0.693147, abs=1e-6)
    assert v.grad.flatten().tolist() == pytest.approx([25 * 1.6, 25 * 2.4])


def test_music_checks_4_and_5_tango_and_crpo():
    """Errors .10, .13 | .101, .1295, beta 2000: -1000 * (-.03 + .0285) = 1.5, loss .2014; CRPO adds the winner's .10."""
    tango, _ = loss_and_grad(Pairwise(beta=2000), 0.10, 0.13, 0.101, 0.1295)
    assert tango.metrics["logit"].item() == pytest.approx(1.5) and tango.per_group.item() == pytest.approx(0.2014, abs=5e-5)
    crpo, _ = loss_and_grad(Regularized(objective=Pairwise(beta=2000), sft=1.0), 0.10, 0.13, 0.101, 0.1295)
    assert crpo.per_group.item() == pytest.approx(0.3014, abs=5e-5)


# --- VRPO's variances on a picture of one number, section 8 -----------------------------------------------------------

def test_vrpo_check_4_a_shared_draw_has_41_times_less_variance():
    """x0 = 1, alpha .6, sigma .8, predictions .8 x_t and .7 x_t: mean errors .36 and .37, Var(difference) .008768 with common
    noise, .15303 + .21156 = .36459 with a noise each. Tolerances: four standard errors of 20,000 draws."""
    n = 20_000
    one = torch.ones(n, 1)
    batch = Batch(x0=one[:, None], cond=Cond(tokens=torch.zeros(n, 1, 1)), utility=one, valid=one.bool(),
                  key=torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)], 1))
    scale = {"policy": 0.8, "reference": 0.7}
    process = VariancePreserving(torch.tensor([0.36]))
    est = DenoisingELBO()(batch, context(lambda name, xt, t, cond: scale[name] * xt, process), "reference")
    apart = DenoisingELBO()(batch, context(lambda name, xt, t, cond: 0.7 * xt, process, seed=1), None)
    shared, redrawn = -2 * est.log_ratio.double(), est.error.double() - apart.error.double()
    assert est.error.mean().item() == pytest.approx(0.36, abs=4 * (0.15303 / n) ** 0.5)
    assert est.reference_error.mean().item() == pytest.approx(0.37, abs=4 * (0.21156 / n) ** 0.5)
    assert shared.mean().item() == pytest.approx(-0.01, abs=4 * (0.008768 / n) ** 0.5)
    assert shared.var().item() == pytest.approx(0.008768, rel=0.05)
    assert redrawn.var().item() == pytest.approx(0.36459, rel=0.08)


# --- MaPO, section 9 -------------------------------------------------------------------------------------------------

def test_mapo_check_8_one_forward_of_2b_latents():
    model = Linear(policy=0.3)
    Preference(DenoisingELBO(), MaPO()).loss(batch_of(b=3), context(model))
    assert [(name, len(xt)) for name, xt, _, _ in model.calls] == [("policy", 6)]


@pytest.mark.parametrize("objective", [MaPO(), MaPOAAAI(), MaPOAAAI(beta=1024), SFT()], ids=str)
def test_mapo_stays_finite_for_errors_of_0_to_1000(objective):
    values = (0.0, 1e-8, 1e-4, 1.0, 50.0, 1e3)
    for e_w in values:
        for e_l in values:
            loss, grad = loss_and_grad(objective, e_w, e_l, dtype=torch.float32)
            assert math.isfinite(loss.per_group.item()) and all(map(math.isfinite, grad))


def test_mapo_ignores_the_estimators_weighting():
    """The card's ell is the plain error: T, s and beta are tuned to it."""
    losses = [Preference(DenoisingELBO(weighting=w), MaPO()).loss(batch_of(), context(Linear(policy=0.3))).per_group
              for w in (ELBO(), MinSNR())]
    assert torch.equal(*losses)


# --- links: what the derivatives must be -----------------------------------------------------------------------------

@pytest.mark.parametrize("link, slope", [
    (Logistic(), -1.0),                     # -beta/2 at margin 0
    (Logistic(smoothing=0.2), -0.6),        # -beta (1/2 - eps)
    (Robust(flip=0.2), -1 / 0.6),           # -beta/2 ((1-f) + f) / (1-2f)
    (Squared(), -0.5),                      # 2 (0 - 1/(2 beta))
    (Hinge(), -2.0),                        # -beta
])
def test_slopes_at_margin_zero(link, slope):
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    link(margin, torch.zeros_like(margin), 2.0).sum().backward()
    assert margin.grad.item() == pytest.approx(slope)


# --- paired statistics -----------------------------------------------------------------------------------------------

def test_too_few_prompts_decide_nothing():
    """Even a clean sweep of five prompts has a two-sided sign test of 2/2^5 = 0.0625; of six, 0.03125."""
    for count in range(1, 6):
        sweep = paired(np.zeros((count, 4)), np.ones((count, 4)))
        assert (sweep.verdict, sweep.win_rate) == ("undecided", 1.0) and sweep.sign_test > 0.05
        assert sweep.prompts_needed is None or sweep.prompts_needed > count
        assert sweep.sentence.startswith("No difference is shown at this size") and "level" not in sweep.sentence
    assert paired(np.zeros((6, 1)), np.ones((6, 1))).verdict == "better"
    assert paired(np.ones((6, 1)), np.zeros((6, 1))).verdict == "worse"


def test_one_value_for_all_prompts_is_no_certainty():
    """Two seeds, one won and one tied at each of eight prompts: a rate of 0.75 without spread is still only eight prompts."""
    result = paired(np.zeros((8, 2)), np.asarray([[1.0, 0.0]] * 8))
    assert result.win_rate == 0.75 and result.win_rate_low < 0.75 < result.win_rate_high
    level = paired(np.ones((8, 1)), np.ones((8, 1)))
    assert level.win_rate_low < 0.5 < level.win_rate_high and level.verdict == "undecided"


def test_false_alarms_at_any_number_of_prompts():
    """Two equal models: at most 5 % (plus 3 standard errors of 400 runs) of verdicts, however few the prompts and seeds."""
    random = np.random.default_rng(3)
    for count, seeds in ((1, 4), (2, 4), (4, 1), (5, 2), (6, 1), (8, 4)):
        runs = [paired(*random.normal(size=(2, count, seeds)), seed=i, resamples=300).verdict for i in range(400)]
        assert 1 - runs.count("undecided") / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5, (count, seeds)


def test_the_interval_of_a_difference_is_no_share():
    """Scores that all rise by exactly 1, or do not move: Wilson's interval of a share has nothing to say on them."""
    same = paired(np.full((60, 1), 0.3), np.full((60, 1), 0.3))
    assert (same.difference, same.difference_low, same.difference_high) == (0.0, 0.0, 0.0)
    up, down = paired(np.zeros((60, 1)), np.ones((60, 1))), paired(np.ones((60, 1)), np.zeros((60, 1)))
    assert (up.difference_low, up.difference_high) == (-down.difference_high, -down.difference_low) == (1.0, 1.0)
    assert bootstrap(np.zeros((1, 9)), seed=0, resamples=50) == [(0.0, 0.0)]


def test_prompts_needed_is_never_fewer_than_can_decide():
    assert prompts_needed(np.ones(3)) == 6


# --- the loss of a step ----------------------------------------------------------------------------------------------

def test_averaging_draws_inside_the_link_is_below_averaging_losses():
    """Jensen (notation.md section 6): -log sigmoid(mean z) <= mean of -log sigmoid(z); draws go inside."""
    batch, model = batch_of(b=4), Linear(policy=0.3, reference=0.2)
    estimator = DenoisingELBO(draws=8)
    inside = Preference(estimator, Pairwise(beta=20)).loss(batch, context(model)).per_group
    n = estimator.noised(batch, context(model))
    error = [(n.noise - s * n.xt).square().flatten(1).mean(1).view(8, 4, 2) for s in (0.3, 0.2)]
    z = -10 * ((error[0] - error[1])[:, :, 0] - (error[0] - error[1])[:, :, 1])
    torch.testing.assert_close(inside, torch.nn.functional.softplus(-z.mean(0)), rtol=1e-4, atol=1e-6)
    assert (inside <= torch.nn.functional.softplus(-z).mean(0) + 1e-6).all()


def test_alpha_and_sigma_are_the_schedulers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    process = VariancePreserving.from_scheduler(scheduler)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 3, generator=g)
    n = process.noise(x0, process.grid(), noise)
    torch.testing.assert_close(V().target(n), scheduler.get_velocity(x0, noise, torch.arange(1000)))
