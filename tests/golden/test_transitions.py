"""PSO on a distilled model's own steps: the numbers of pso.md sections 2a and 9."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign.data.sources import along
from diffalign.likelihood import DenoisingELBO, Transitions
from diffalign.methods import Preference
from diffalign.objectives import Pairwise
from diffalign.process import Discrete, Eps, V, Velocity
from diffalign.process.solver import bridge_std, stochastic_step
from diffalign.sampling.latents import Sampler
from diffalign.types import Batch, Cond, Estimate, Memory, Steps

from .test_likelihood import Linear, batch_of, context, sd_process
from .test_noise_plans import gaussian

TURBO = (999, 749, 499, 249)


def time(*index):
    return (torch.tensor(index).double() + 1) / 1000


def slope(solver, low, high):
    """b / std: derivative of the transition's mean by the noise prediction, over its standard deviation."""
    process = sd_process()
    ctx, x, zero = context(None, process), torch.zeros(len(low), 1), torch.zeros(len(low), 1)
    t, to = process.snap(high), process.snap(low)
    up, std = stochastic_step(ctx, x, zero + 1, t, to, solver)
    down, _ = stochastic_step(ctx, x, zero, t, to, solver)
    return ((up - down).squeeze(1) / std).tolist()


def test_euler_ancestral_of_turbo():
    """std / alpha = sigma_up: 3.9193, 1.4816, 0.6259 in VE coordinates; b/std -3.438, -2.325, -2.101."""
    process = sd_process()
    low, high = time(749, 499, 249), time(999, 749, 499)
    up = bridge_std(process, low, high) / process.coefficients(process.snap(low))[0]
    assert up.tolist() == pytest.approx([3.9193, 1.4816, 0.6259], abs=2e-4)
    assert slope("ancestral", low, high) == pytest.approx([-3.438, -2.325, -2.101], abs=1e-3)


def test_renoising_of_dmd2():
    """4 steps: -3.58, -2.53, -2.33; 8 steps: -2.00, -1.79, -1.64, -1.55, -1.51, -1.54, -1.74."""
    assert slope("lcm", time(749, 499, 249), time(999, 749, 499)) == pytest.approx([-3.58, -2.53, -2.33], abs=6e-3)
    eight = [999, 874, 749, 624, 499, 374, 249, 124]
    assert slope("lcm", time(*eight[1:]), time(*eight[:-1])) == pytest.approx(
        [-2.00, -1.79, -1.64, -1.55, -1.51, -1.54, -1.74], abs=6e-3)


@pytest.mark.parametrize("swap, loss", [(False, 0.005862), (True, 5.142169)])
def test_toy_of_one_step(swap, loss):
    """749 -> 499, D = 2, b/std = -2.325: l = (b/std) mean[z d] - (b/std)^2/2 mean[d^2], samples from the reference.

    z_w = (1, 0), d_w = (-.1, .1): .116239 - .027024 = .089215; z_l = (0, 1), d_l = (.1, 0): 0 - .013511; beta 50: 5.13631.
    """
    process, timesteps = sd_process(), (749, 499)
    x = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    change = {"policy": torch.tensor([[-0.1, 0.1], [0.1, 0.0]]), "reference": torch.zeros(2, 2)}
    predict = lambda name, xt, t, cond: 0.5 * xt + change[name]
    ctx = context(predict, process)
    t, to = (process.snap(time(i)).expand(2) for i in timesteps)
    mean, std = stochastic_step(ctx, x, 0.5 * x, t, to, "ancestral")
    after = mean + std[:, None] * torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batch = Batch(x0=torch.zeros(1, 2, 2), cond=Cond(tokens=torch.zeros(1, 1, 1)), valid=torch.ones(1, 2, dtype=torch.bool),
                  utility=torch.tensor([[0.0, 1.0] if swap else [1.0, 0.0]]), key=torch.zeros(1, 2, dtype=torch.int64),
                  steps=Steps(x_t=x[None], x_s=after[None], t=t[:1], s=to[:1], solver="ancestral"))
    estimator = Transitions()
    est = estimator(batch, ctx, "reference")
    assert est.log_ratio[0].tolist() == pytest.approx([0.089215, -0.013511], abs=1e-5)
    value = Preference(estimator, Pairwise(beta=50, clip=0.1)).loss(batch, ctx).per_group
    assert value.item() == pytest.approx(loss, abs=2e-4)


def test_clip():
    """ln 1.1 - ln 0.9 = 0.20067: the margin stays below 10.03 at beta 50, and its gradient ends there."""
    ratio = torch.tensor([[5.0, -5.0]], requires_grad=True)
    est = Estimate(policy=ratio, reference=torch.zeros(1, 2), error=-2 * ratio, reference_error=torch.zeros(1, 2),
                   t=torch.zeros(1, 2))
    batch = Batch(x0=torch.zeros(1, 2, 1), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([[1.0, 0.0]]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64))
    loss = Pairwise(beta=50, clip=0.1)(est, batch, Memory())
    assert loss.metrics["logit"].item() == pytest.approx(10.03, abs=5e-3)
    loss.per_group.sum().backward()
    assert ratio.grad.tolist() == [[0.0, 0.0]]


def sampled(solver="lcm", timesteps=TURBO, predict=None, param=None, groups=3, k=2, size=4):
    """Samples of a Gaussian model with their paths, as a batch."""
    process, key = sd_process(), torch.stack([torch.arange(groups), torch.zeros(groups).long()], 1)
    ctx = context(predict or gaussian(process, param), process, param)
    keys = torch.cat([key.repeat_interleave(k, 0), torch.arange(k).repeat(groups)[:, None]], 1)
    cond = Cond(tokens=torch.zeros(groups * k, 1, 1))
    x0, states = Sampler(solver=solver, timesteps=timesteps)(ctx, "current", cond, keys, (size,))
    batch = Batch(x0=x0.view(groups, k, size), cond=Cond(tokens=torch.zeros(groups, 1, 1)), key=key,
                  utility=torch.tensor([[1.0, 0.0]]).repeat(groups, 1), valid=torch.ones(groups, k, dtype=torch.bool))
    sampler = Sampler(solver=solver, timesteps=timesteps)
    return ctx, along(batch, states.view(groups, k, *states.shape[1:]), sampler.levels(process), sampler)


@pytest.mark.parametrize("solver", ["lcm", "ancestral"])
@pytest.mark.parametrize("param", [Eps(), V()])
def test_the_density_is_the_samplers(solver, param):
    """(x' - mean) / std of the sampling model is the injected unit noise, so its error has mean 1 at every step."""
    ctx, batch = sampled(solver, param=param, groups=64, size=64)
    est = Transitions()(batch, ctx, None)
    assert est.error.shape == (3 * 64, 2) == batch.utility.shape
    assert est.error.view(3, -1).mean(1).tolist() == pytest.approx([1.0] * 3, abs=4 * (2 / (64 * 64 * 2)) ** 0.5)
    assert [t.unique().item() for t in est.t.reshape(3, -1)] == pytest.approx([1.0, 0.75, 0.5])
    _, again = sampled(solver, param=param, groups=64, size=64)
    assert torch.equal(again.steps.x_s, batch.steps.x_s)
    _, fewer = sampled(solver, param=param, groups=3, size=64)
    torch.testing.assert_close(fewer.steps.x_s[:3], batch.steps.x_s[:3])  # a sample does not depend on its batch


def test_equal_models_give_ln_2_and_the_gradient_is_minus_half_beta_b_z():
    """Check 1: dL/df_w = -(beta/2)(b/(std D)) z_w, a group for each of the three steps."""
    process = sd_process()
    bump = torch.nn.Parameter(torch.zeros(3, 3, 2, 4))  # step, group, candidate

    def predict(name, xt, t, cond):
        raw = gaussian(process)(name, xt, t, cond)
        return raw + bump.flatten(0, 2) if name == "policy" else raw

    _, batch = sampled()
    ctx = context(predict, process)
    loss = Preference(Transitions(), Pairwise(beta=50, clip=0.1)).loss(batch, ctx).per_group
    assert loss.tolist() == pytest.approx([math.log(2)] * 9, abs=1e-5)
    loss.sum().backward()
    factor = slope("lcm", time(749, 499, 249), time(999, 749, 499))
    for step, (high, low) in enumerate(zip(TURBO, TURBO[1:])):
        t, to = (process.snap(time(i)).expand(6) for i in (high, low))
        x, after = (part[3 * step:3 * step + 3].flatten(0, 1) for part in (batch.steps.x_t, batch.steps.x_s))
        mean, std = stochastic_step(ctx, x, gaussian(process)(None, x, t, None), t, to, "lcm")
        z = ((after - mean) / std[:, None]).view(3, 2, 4)
        expected = -25 * factor[step] / 4 * z
        torch.testing.assert_close(bump.grad[step, :, 0], expected[:, 0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(bump.grad[step, :, 1], -expected[:, 1], rtol=1e-3, atol=1e-5)


def moved(x_t, apart):
    """How far the mean of the winner's step from x_t moves along ``apart`` by one descent step, both [D] or [2, D] (winner,
    loser). The model predicts theta x, x_s - mean is ``apart``."""
    process, theta = sd_process(), torch.tensor(0.5, requires_grad=True)
    ctx = context(lambda name, xt, t, cond: theta * xt if name == "policy" else 0.5 * xt, process)
    x, t, s = torch.tensor(x_t).view(-1, 2), *(process.snap(time(i)) for i in (501, 451))
    mean, std = stochastic_step(ctx, x, 0.5 * x, t.expand(len(x)), s.expand(len(x)), "ancestral")
    batch = Batch(x0=torch.zeros(1, 2, 2), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([[1.0, 0.0]]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64),
                  steps=Steps(x_t=x[None], x_s=(mean + torch.tensor(apart))[None], t=t, s=s, solver="ancestral"))
    Preference(Transitions(), Pairwise(beta=10)).loss(batch, ctx).per_group.sum().backward()
    after, _ = stochastic_step(ctx, x, (0.5 - 1e-2 * theta.grad) * x, t.expand(len(x)), s.expand(len(x)), "ancestral")
    return ((after - mean)[0] * torch.tensor(apart[0])).sum().item()


def test_a_shared_state_moves_the_mean_to_the_winner_and_two_states_may_not():
    """tailorpo.md checks 2 and 3. From x_t = (1, 2), the children (.3, -.1) apart: x_t . (x_w - x_l) = .1 > 0, so that the
    mean moves along the difference. From (1, 0) and (5, 0), each child .1 above its mean: 1 * .1 - 5 * .1 < 0, away from
    the winner."""
    assert moved([[1.0, 2.0]], [[0.15, -0.05], [-0.15, 0.05]]) > 0
    assert moved([[1.0, 0.0], [5.0, 0.0]], [[0.1, 0.0], [0.1, 0.0]]) < 0


def test_slope_of_a_shared_state():
    """spo.md and lpo_lrm.md check 1 and 2: dL/df = -(beta/2)(b/(std D))(z_w - z_l), b = -.2688 at 501, std .4293."""
    process, z = sd_process(), torch.tensor([[1.0, 0.0, -1.0, 0.5], [-0.5, 1.0, 0.0, -1.0]])
    x, f = torch.tensor([[0.3, -0.2, 0.1, 0.4]]), torch.zeros(1, 4, requires_grad=True)
    ctx = context(lambda name, xt, t, cond: f if name == "policy" else torch.zeros(1, 4), process)
    t, s = (process.snap(time(i)) for i in (501, 451))
    mean, std = stochastic_step(ctx, x, torch.zeros(1, 4), t, s, "ancestral")
    batch = Batch(x0=torch.zeros(1, 2, 4), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([[1.0, 0.0]]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64),
                  steps=Steps(x_t=x[None], x_s=(mean + std * z)[None], t=t, s=s, solver="ancestral"))
    loss = Preference(Transitions(), Pairwise(beta=10)).loss(batch, ctx).per_group
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    expected = -(10 / 2) * (-0.2688 / (0.4293 * 4)) * (z[0] - z[1])
    torch.testing.assert_close(f.grad[0], expected, rtol=1e-3, atol=1e-4)


def test_ties_and_wrong_paths():
    ctx, batch = sampled()
    level = replace(batch, utility=torch.ones(9, 2))
    model = Linear(policy=1.0, reference=0.5)
    assert Preference(Transitions(), Pairwise(beta=50)).loss(level, context(model)).per_group.sum() == 0
    with pytest.raises(ValueError, match="the step of every candidate"):
        Transitions()(replace(batch, steps=None), ctx, None)


def test_offline_pso_with_nu_1_on_all_times_is_diffusion_dpo():
    """beta here carries the factor 1/2, which PSO's does not: beta_PSO = beta/2 (check 8)."""
    model, batch = Linear(policy=0.3, reference=0.2), batch_of()
    plain = Preference(DenoisingELBO(), Pairwise(beta=50)).loss(batch, context(model)).per_group
    pso = Preference(DenoisingELBO(), Pairwise(beta=50, loser_scale=1.0)).loss(batch, context(model)).per_group
    assert torch.equal(plain, pso)
    distilled = DenoisingELBO(times=Discrete(timesteps=TURBO))
    assert set(sd_process().index(distilled.noised(batch_of(b=50), context(model)).t).tolist()) == set(TURBO)


def test_flow_at_its_noise_end():
    """A flow's re-noising stays finite where alpha vanishes: b = -alpha' sigma."""
    from diffalign.process import RectifiedFlow
    process = RectifiedFlow()
    ctx, t, to = context(None, process, Velocity()), process.snap(torch.ones(1)), torch.tensor([0.75])
    up, std = stochastic_step(ctx, torch.zeros(1, 1), torch.ones(1, 1), t, to, "lcm")
    assert up.item() == pytest.approx(-0.25 * t.item(), abs=1e-6) and std.item() == 0.75
