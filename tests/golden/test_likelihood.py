"""The estimate against closed forms: notation.md section 8, checks 1 to 7."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from diffalign.likelihood import ELBO, DenoisingELBO, MinSNR, Simple
from diffalign.methods import Context, Preference
from diffalign.objectives import MaPO, Pairwise
from diffalign.process import X0, Eps, Independent, RectifiedFlow, V, VariancePreserving, Velocity
from diffalign.types import Batch, Cond, Memory, Noised


def sd_process():
    return VariancePreserving.from_scheduler(DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))


def gaussian_error(x0, s, alpha, sigma):
    """Expected squared error of the noise given x0 for data N(0, s^2) and the optimal prediction eps^ = sigma x_t / V."""
    v = alpha**2 * s**2 + sigma**2
    return (alpha**2 * s**2 / v) ** 2 + (sigma * alpha * x0 / v) ** 2


def true_log_ratio(x0, s_theta=1.5, s_ref=1.0):
    return math.log(s_ref / s_theta) + x0**2 / 2 * (1 / s_ref**2 - 1 / s_theta**2)


def noised_at(process, t):
    zeros = torch.zeros(len(t), 1)
    return process.noise(zeros, t, zeros)


@pytest.mark.parametrize("x0, value", [(0.0, -0.405465), (0.7, -0.269354), (2.0, 0.705646)])
def test_flow_elbo_is_the_true_log_ratio(x0, value):
    # integral over t of (1-t)/t * (u-error_theta - u-error_ref), by quadrature in log-SNR: weight 1/2 on the noise error
    assert true_log_ratio(x0) == pytest.approx(value, abs=1e-6)
    process = RectifiedFlow(t_min=1e-7)
    lam = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    t = 1 / (1 + torch.exp(lam / 2))
    alpha, sigma = 1 - t, t
    delta = gaussian_error(x0, 1.5, alpha, sigma) - gaussian_error(x0, 1.0, alpha, sigma)
    assert (-0.5 * torch.trapezoid(delta, lam)).item() == pytest.approx(value, abs=1e-6)
    # and ours in t: weight * dt, in both native spaces, agrees with the same integral
    tf = t.float().clamp(1e-6, 1 - 1e-6)
    n = noised_at(process, tf)
    weight_eps = 0.5 * ELBO(normalise=False, max=None)(n, Eps(), process).double()
    weight_flow = 0.5 * ELBO(normalise=False, max=None)(n, Velocity(), process).double()
    assert torch.allclose(weight_flow, ((1 - n.t) / n.t).double(), rtol=1e-4)
    inner = (t > 1e-4) & (t < 1 - 1e-4)
    dt = -t[1:] + t[:-1]
    mid = lambda y: (y[1:] + y[:-1]) / 2
    ours = -(mid(weight_eps * delta * inner) * dt).sum().item()
    assert ours == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("x0, value", [(0.0, -0.40946), (0.7, -0.27196), (2.0, 0.71296)])
def test_discrete_sd_schedule_elbo(x0, value):
    process = sd_process()
    n = noised_at(process, process.grid())
    alpha, sigma = n.alpha.double(), n.sigma.double()
    delta = gaussian_error(x0, 1.5, alpha, sigma) - gaussian_error(x0, 1.0, alpha, sigma)
    weight = 0.5 * ELBO(normalise=False, max=None)(n, Eps(), process).double()
    assert -(weight * delta).mean().item() == pytest.approx(value, abs=2e-5)
    # the same number from the v-error: eps-error = abar * v-error
    weight_v = 0.5 * ELBO(normalise=False, max=None)(n, V(), process).double()
    assert -(weight_v * delta / n.alpha.double() ** 2).mean().item() == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("x0, value", [(0.0, -0.09799), (0.7, -0.06537), (2.0, 0.16830)])
def test_simple_weighting_keeps_the_sign(x0, value):
    process = sd_process()
    n = noised_at(process, process.grid())
    alpha, sigma = n.alpha.double(), n.sigma.double()
    delta = gaussian_error(x0, 1.5, alpha, sigma) - gaussian_error(x0, 1.0, alpha, sigma)
    assert -delta.mean().item() == pytest.approx(value, abs=2e-5)


def test_flow_simple_values():
    # RF flow-error with unit weight: -0.39270 at x0 = 0 (check 3); u-error = eps-error / (1-t)^2
    t = torch.linspace(1e-6, 1 - 1e-6, 200001, dtype=torch.float64)
    delta = gaussian_error(0.0, 1.5, 1 - t, t) - gaussian_error(0.0, 1.0, 1 - t, t)
    assert -torch.trapezoid(delta / (1 - t) ** 2, t).item() == pytest.approx(-0.39270, abs=1e-4)


def test_gamma_of_the_sd_schedule():
    # notation.md section 5: T*gamma = 503 at index 1, 51.8 at 10, 6.63 at 100, 3.35 at 500, 6.10 at 999; sum of gamma 7.028
    process = sd_process()
    weight = process.elbo_weight(process.grid())
    assert weight[[1, 10, 100, 500, 999]].tolist() == pytest.approx([503, 51.8, 6.63, 3.35, 6.10], rel=2e-3)
    assert weight.sum().item() / 1000 == pytest.approx(7.028, abs=1e-3)


def test_normalised_elbo_has_mean_one():
    process = sd_process()
    n = noised_at(process, process.grid())
    for param in (Eps(), V()):
        assert ELBO(max=None)(n, param, process).mean().item() == pytest.approx(1, rel=1e-4)


def test_min_snr_by_hand():
    # SNR 9 (alpha 0.9487, sigma 0.3162): min(9,5)/9 on eps; * alpha^2 = 0.9 on v, i.e. 5/(9+1); 5 on x0
    one = torch.ones(1)
    n = Noised(x0=one, xt=one, noise=one, t=one, alpha=(0.9 * one).sqrt(), sigma=(0.1 * one).sqrt(), log_snr=(9 * one).log())
    got = [MinSNR(gamma=5)(n, p, None).item() for p in (Eps(), V(), X0())]
    assert got == pytest.approx([5 / 9, 0.5, 5.0], rel=1e-5)


def test_conversions_by_hand():
    # notation.md section 2: RF x0=.3, eps=-1.2, t=.4, u^=-1.1 -> u=-1.5, x0^=.14, eps^=-.96
    x0, eps = torch.tensor([[0.3]]), torch.tensor([[-1.2]])
    n = RectifiedFlow().noise(x0, torch.tensor([0.4]), eps)
    raw = torch.tensor([[-1.1]])
    assert Velocity().target(n).item() == pytest.approx(-1.5)
    assert Velocity().to_x0(raw, n).item() == pytest.approx(0.14, abs=1e-6)
    assert Velocity().to_eps(raw, n).item() == pytest.approx(-0.96, abs=1e-6)
    # VP alpha=.6, sigma=.8, v^=-.5 -> v=-.96, x0^=-.068, eps-error .076176 = .36 * .46^2
    n = VariancePreserving(torch.tensor([0.36])).noise(x0, torch.tensor([1.0]), eps)
    raw = torch.tensor([[-0.5]])
    assert V().target(n).item() == pytest.approx(-0.96, abs=1e-6)
    assert V().to_x0(raw, n).item() == pytest.approx(-0.068, abs=1e-6)
    assert (eps - V().to_eps(raw, n)).square().item() == pytest.approx(0.076176, abs=1e-6)
    assert V().error_to_eps(n).item() == pytest.approx(0.36)


def test_every_sd_timestep_is_hit_exactly():
    process, scheduler = sd_process(), DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    index = process.index(process.grid())
    assert index.tolist() == list(range(1000))
    assert process.timestep(process.grid()).tolist() == [float(i) for i in range(1000)]
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    assert torch.bincount(process.index(process.snap(u)), minlength=1000).tolist() == [100] * 1000
    x, e = torch.randn(1000, 4), torch.randn(1000, 4)
    assert torch.equal(process.noise(x, process.grid(), e).xt, scheduler.add_noise(x, e, index))


# --- the estimator itself --------------------------------------------------------------------------------------------

def batch_of(b=3, k=2, shape=(4, 4, 4)):
    g = torch.Generator().manual_seed(0)
    utility = torch.zeros(b, k)
    utility[:, 0] = 1
    return Batch(x0=torch.randn(b, k, *shape, generator=g), cond=Cond(tokens=torch.randn(b, 2, 3, generator=g)),
                 utility=utility, valid=torch.ones(b, k, dtype=torch.bool),
                 key=torch.stack([torch.arange(b), torch.zeros(b, dtype=torch.int64)], 1))


class Linear:
    """A denoiser with one number a weight set: raw = scale * xt. Counts its calls and keeps their inputs."""

    def __init__(self, **scales):
        self.scales, self.calls = scales, []

    def __call__(self, name, xt, t, cond):
        self.calls.append((name, xt.clone(), t.clone(), torch.is_grad_enabled()))
        assert len(cond.tokens) == len(xt)
        return self.scales[name] * xt


def context(predict, process=None, param=None, seed=0):
    return Context(predict=predict, process=process or sd_process(), param=param or Eps(), seed=seed, step=0, memory=Memory())


def test_check_1_equal_weights_give_ln_2_for_any_beta():
    for beta in (1, 2000, 1e5):
        loss = Preference(DenoisingELBO(), Pairwise(beta=beta)).loss(batch_of(), context(Linear(policy=0.3, reference=0.3)))
        assert loss.per_group.tolist() == pytest.approx([math.log(2)] * 3)


def test_policy_and_reference_see_the_same_noise_and_the_reference_goes_first():
    model = Linear(policy=0.3, reference=0.2)
    DenoisingELBO(draws=2)(batch_of(), context(model), against="reference")
    (first, xt, t, _), (second, xt2, t2, _) = model.calls
    assert (first, second) == ("reference", "policy")
    assert torch.equal(xt, xt2) and torch.equal(t, t2)


def test_noise_and_time_are_shared_inside_a_group_and_differ_between_groups_draws_and_visits():
    batch, process = batch_of(b=2, k=3), sd_process()
    n = DenoisingELBO(draws=2).noised(batch, context(None, process))
    noise, t = n.noise.view(2, 2, 3, -1), n.t.view(2, 2, 3)
    assert torch.equal(noise[:, :, :1].expand_as(noise), noise) and torch.equal(t[:, :, :1].expand_as(t), t)
    assert len({tuple(x.tolist()) for x in noise[:, :, 0].flatten(0, 1)}) == 4
    again = DenoisingELBO(draws=2).noised(batch, context(None, process, seed=1))
    assert not torch.equal(again.noise, n.noise)
    own = DenoisingELBO(noise=Independent()).noised(batch, context(None, process)).noise.view(2, 3, -1)
    assert not torch.equal(own[:, 0], own[:, 1])


def test_rows_do_not_depend_on_the_batch_they_came_in():
    whole, model = batch_of(b=5), Linear(policy=0.3, reference=0.2)
    one = DenoisingELBO(draws=3)(whole, context(model), "reference")
    for i in range(5):
        part = Batch(**{f: getattr(whole, f)[i:i + 1] for f in ("x0", "utility", "valid", "key")},
                     cond=Cond(tokens=whole.cond.tokens[i:i + 1]))
        single = DenoisingELBO(draws=3)(part, context(model), "reference")
        assert torch.allclose(single.policy, one.policy[i:i + 1], rtol=1e-6)
        assert torch.equal(single.t, one.t[i:i + 1])


def test_reference_free_runs_exactly_one_pass():
    model = Linear(policy=0.3)
    Preference(DenoisingELBO(), MaPO()).loss(batch_of(), context(model))
    assert [call[0] for call in model.calls] == ["policy"]


def test_draws_are_averaged_inside_the_estimate():
    batch, model = batch_of(b=1), Linear(policy=0.3, reference=0.2)
    est = DenoisingELBO(draws=4)(batch, context(model), "reference")
    noised = DenoisingELBO(draws=4).noised(batch, context(model))
    error = (noised.noise - 0.3 * noised.xt).square().flatten(1).mean(1).view(4, 1, 2)
    assert torch.allclose(est.policy, -0.5 * error.mean(0), rtol=1e-6)


def test_mean_reduction_does_not_grow_with_resolution():
    # check 6: tiling the latent leaves the mean-reduced error unchanged
    process, eps, values = sd_process(), torch.randn(1, 4, 4, 4), []
    for factor in (1, 2):
        x0, noise = (x.repeat(1, 1, factor, factor) for x in (torch.ones(1, 4, 4, 4), eps))
        n = process.noise(x0, torch.tensor([0.5]), noise)
        values.append((n.noise - 0.3 * n.xt).square().flatten(1).mean(1))
    assert torch.allclose(*values, rtol=1e-5)


def test_monte_carlo_estimate_of_a_gaussian():
    # optimal denoisers of N(0, 1.5^2) and N(0, 1) at x0 = 0.7, unit weight in eps over the SD schedule: -0.06537 (check 3).
    # Ours carries the factor 1/2 and averages elements: 4,096 draws of 64 elements, within 4 standard errors.
    process = sd_process()

    def predict(name, xt, t, cond):
        s = {"policy": 1.5, "reference": 1.0}[name]
        alpha, sigma = (c.view(-1, 1) for c in process.coefficients(t))
        return sigma * xt / (alpha**2 * s**2 + sigma**2)

    batch = Batch(x0=torch.full((1, 1, 64), 0.7), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.ones(1, 1),
                  valid=torch.ones(1, 1, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64))
    draws = 4096
    ctx = context(predict, process)
    noised = DenoisingELBO(draws=draws).noised(batch, ctx)
    per_draw = [(noised.noise - predict(n, noised.xt, noised.t, None)).square().mean(1) for n in ("policy", "reference")]
    standard_error = (-0.5 * (per_draw[0] - per_draw[1])).std().item() / draws**0.5
    est = DenoisingELBO(draws=draws)(batch, ctx, "reference")
    assert est.log_ratio.item() == pytest.approx(0.5 * -0.06537, abs=4 * standard_error)


def test_simple_is_one():
    assert Simple()(noised_at(sd_process(), torch.tensor([0.2, 0.9])), Eps(), None).tolist() == [1, 1]
