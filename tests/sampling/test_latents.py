"""Latents drawn by the loop's own predict, against diffusers' schedulers on the same noise."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from diffalign import rng
from diffalign.process import Eps, VariancePreserving
from diffalign.sampling.latents import Sampler
from diffalign.types import Cond
from tests.golden.test_likelihood import context

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TURBO, SHAPE = (999, 749, 499, 249), (4, 4, 4)
KEYS = torch.tensor([[3, 0, 0], [3, 0, 1], [8, 1, 0]])


def model(x, t):
    """Some smooth function of latent and timestep."""
    return torch.tanh(0.7 * x + t.float().view(-1, 1, 1, 1) / 1000 - 0.3)


def ours(sampler):
    process = VariancePreserving.from_scheduler(DDIMScheduler(**SCHEDULE))
    ctx = context(lambda name, xt, t, cond: model(xt, process.timestep(t)), process, Eps())
    return sampler(ctx, "current", Cond(tokens=torch.zeros(3, 1, 1)), KEYS, SHAPE)


def noise(number):
    """What the sampler adds on the way to its level ``number``; 0 is where it starts."""
    if number == 0:
        return rng.normal(0, "sample", KEYS, SHAPE)
    return rng.normal(0, "renoise", torch.cat([KEYS, torch.full((3, 1), number)], 1), SHAPE)


def test_lcm_is_diffusers_lcm(monkeypatch):
    scheduler, drawn = LCMScheduler(**SCHEDULE, original_inference_steps=1000), iter(range(1, 4))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: noise(next(drawn)))
    scheduler.set_timesteps(4, original_inference_steps=1000)
    assert scheduler.timesteps.tolist() == list(TURBO)
    x = noise(0)
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(model(x, t.expand(3)), t, x, return_dict=False)
    found, states = ours(Sampler(solver="lcm", timesteps=TURBO))
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)
    assert states.shape == (3, 4, *SHAPE) and torch.equal(states[:, 0], noise(0))


def test_ancestral_is_diffusers_euler_ancestral(monkeypatch):
    """In its own coordinates, y = x / alpha; its last step ends in the predicted image, as ours does."""
    scheduler, drawn = EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"), iter(range(1, 5))

    def drawing(*args, **kwargs):
        number = next(drawn)
        return noise(number) if number < 4 else torch.zeros(3, *SHAPE)

    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", drawing)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == list(TURBO)
    y = noise(0) * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # the same start as ours: unit noise in x
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(y, t)
        y = scheduler.step(model(x, t.expand(3)), t, y, return_dict=False)[0]
    torch.testing.assert_close(ours(Sampler(solver="ancestral", timesteps=TURBO))[0], y, rtol=1e-3, atol=1e-3)


def test_ddim_is_diffusers_ddim():
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    x = noise(0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(3)), t, x, return_dict=False)[0]
    torch.testing.assert_close(ours(Sampler(steps=10))[0], x, rtol=1e-4, atol=1e-4)


def test_guidance():
    """w times the difference from the empty prompt, added to the empty prompt's prediction: w = 0 is that one alone."""
    process = VariancePreserving.from_scheduler(DDIMScheduler(**SCHEDULE))
    full, empty = Cond(tokens=torch.ones(3, 1, 1)), Cond(tokens=torch.zeros(3, 1, 1))
    ctx = context(lambda name, xt, t, cond: 0.5 * xt + cond.tokens.view(-1, 1, 1, 1), process, Eps())
    draw = lambda scale, cond: Sampler(steps=3, guidance_scale=scale)(ctx, "current", cond, KEYS, SHAPE, empty)[0]
    torch.testing.assert_close(draw(0.0, full), draw(1.0, empty))
    torch.testing.assert_close(draw(2.0, full), Sampler(steps=3)(
        context(lambda name, xt, t, cond: 0.5 * xt + 2.0, process, Eps()), "current", full, KEYS, SHAPE)[0])


@pytest.mark.parametrize("solver", ["ddim", "lcm", "ancestral"])
def test_a_sample_is_a_function_of_its_key(solver):
    x0, states = ours(Sampler(solver=solver, timesteps=TURBO))
    again, _ = ours(Sampler(solver=solver, timesteps=TURBO))
    assert torch.equal(x0, again) and torch.isfinite(states).all()
    assert not torch.equal(x0[0], x0[1])
