"""Golden numbers of timestep_aware_dpo.md, inpo.md, smpo.md and vrpo.md: times, weights, inversions."""

import math

import pytest
import torch

from diffalign.likelihood import DenoisingELBO, HighNoise, Simple
from diffalign.methods import Preference
from diffalign.objectives import Logistic, Pairwise
from diffalign.process import (
    Antithetic,
    Eps,
    Geometric,
    Inverted,
    LowDiscrepancy,
    Mixture,
    Random,
    RectifiedFlow,
    ReNoised,
    Stratified,
    Uniform,
    V,
    VariancePreserving,
    Velocity,
)
from diffalign.process.noise import _step
from diffalign.types import Batch, Cond

from .test_likelihood import Linear, batch_of, context, sd_process

KEYS = torch.stack([torch.arange(4096), torch.zeros(4096, dtype=torch.int64), torch.zeros(4096, dtype=torch.int64)], 1)
PLACES = torch.arange(4096)


# --- times -----------------------------------------------------------------------------------------------------------

def test_geometric_bins():
    """ratio 0.9 over 10 bins: 0.9^k / 6.5132, k = 0 at the noise end: .1535 .1382 .1244 ... .0595 (card 2c)."""
    t = Geometric(ratio=0.9, bins=10).at(torch.linspace(0, 1, 1_000_001, dtype=torch.float64)[:-1])
    shares = torch.histc(t.float(), 10, 0, 1) / len(t)
    expected = [.1535, .1382, .1244, .1119, .1007, .0907, .0816, .0734, .0661, .0595]
    assert shares.flip(0).tolist() == pytest.approx(expected, abs=1e-4)
    noisiest_tenth = (Geometric(ratio=0.9, bins=50).at(torch.rand(100_000, dtype=torch.float64)) > 0.9).float().mean().item()
    assert noisiest_tenth == pytest.approx(0.41, abs=0.01)  # (1 - 0.9^5) / (1 - 0.9^50)
    u = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(Geometric(ratio=1.0).at(u), u)


@pytest.mark.parametrize("times", [Geometric(corrected=True), Geometric(ratio=0.5, bins=4, corrected=True), Mixture(),
                                   Mixture(share=0.2, mean=0.5, std=0.7), Mixture(share=1.0)])
def test_corrections_divide_the_density_out(times):
    """E_p[(1/p) f(t)] = integral of f over (0, 1): f = 1, t, cos 7t, by a fine grid of u."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    t = times.at(u)
    weight = times.correction(t).double()
    for f, truth in ((torch.ones_like(t), 1.0), (t, 0.5), (torch.cos(7 * t), math.sin(7) / 7)):
        assert (weight * f).mean().item() == pytest.approx(truth, abs=2e-3)
    assert weight.max() <= (1 / times.share if isinstance(times, Mixture) else 100)


@pytest.mark.parametrize("sequence", [Random(), Stratified(strata=16), Antithetic(), LowDiscrepancy()])
def test_sequences_are_uniform_and_belong_to_the_run(sequence):
    u = sequence.draw(3, KEYS, PLACES)
    assert u.min() >= 0 and u.max() <= 1 and not torch.equal(u, sequence.draw(4, KEYS, PLACES))
    assert (torch.histc(u.float(), 8, 0, 1) / 512 - 1).abs().max() < 0.2  # 4 sigma of a binomial is 0.17
    order = torch.randperm(4096)
    assert torch.equal(sequence.draw(3, KEYS[order], PLACES[order]), u[order])  # a cut or another order changes nothing
    if not isinstance(sequence, Random):
        with pytest.raises(ValueError, match="places in the run"):
            sequence.draw(3, KEYS, None)


def test_what_the_sequences_promise():
    strata = (Stratified(strata=16).draw(0, KEYS, PLACES) * 16).long().view(-1, 16)
    assert torch.equal(strata.sort(1).values, torch.arange(16).expand(256, 16))
    pairs = Antithetic().draw(0, KEYS, PLACES).view(-1, 2)
    torch.testing.assert_close(pairs.sum(1), torch.ones(2048, dtype=torch.float64))
    golden = LowDiscrepancy().draw(0, KEYS, PLACES).view(-1, 64)
    assert (torch.histc(golden[5].float(), 16, 0, 1) - 4).abs().max() <= 2  # every window covers the interval


@pytest.mark.parametrize("sequence, line, bowl", [
    (Random(), 1 / 24, 1 / 360), (Stratified(strata=2), 1 / 96, 1 / 360), (Antithetic(), 0.0, 1 / 180)])
def test_variance_of_the_mean_of_two_times(sequence, line, bowl):
    """vrpo.md 5.5, of a(t) = t and (t - 1/2)^2: variances 1/12 and 1/180, halved by two draws. A half of (0, 1) has 1/48, so
    two strata 1/96. Mirror images make up for each other in t, and have the very same bowl: worse than two draws."""
    t = sequence.draw(5, KEYS, PLACES).view(-1, 2)
    assert t.mean(1).var().item() == pytest.approx(line, rel=0.13, abs=1e-12)    # 4 standard errors of 2048 pairs
    assert (t - 0.5).square().mean(1).var().item() == pytest.approx(bowl, rel=0.13)


def test_draws_of_a_group_are_strata_of_one_another():
    batch = Batch(**{f: getattr(batch_of(b=3), f) for f in ("x0", "cond", "utility", "valid", "key")}, place=torch.arange(3))
    _, t = DenoisingELBO(draws=8, sequence=Stratified(strata=8)).times_of(batch, 0)
    assert torch.equal((t.view(8, 3) * 8).long().sort(0).values, torch.arange(8)[:, None].expand(8, 3))


def test_a_corrected_density_keeps_the_objective():
    """One draw: outside the link, so the mean loss over times is that of uniform times; several draws: inside."""
    b, model = 3000, Linear(policy=0.3, reference=0.2)
    one = batch_of(b=1)
    many = Batch(x0=one.x0.repeat(b, 1, 1, 1, 1), cond=Cond(tokens=one.cond.tokens.repeat(b, 1, 1)),
                 utility=one.utility.repeat(b, 1), valid=one.valid.repeat(b, 1),
                 key=torch.stack([torch.arange(b), torch.zeros(b, dtype=torch.int64)], 1))

    def mean(times):
        rows = Preference(DenoisingELBO(times=times), Pairwise(beta=50)).loss(many, context(model)).per_group
        return rows.mean().item(), rows.std().item() / b**0.5

    (plain, error), (corrected, error2) = mean(Uniform()), mean(Geometric(ratio=0.7, corrected=True))
    assert abs(plain - corrected) < 4 * (error**2 + error2**2) ** 0.5
    assert DenoisingELBO(times=Mixture(), draws=2)(one, context(model), "reference").importance is None


@pytest.mark.parametrize("bins", [10, 50, 100, 1000])
def test_every_time_of_a_schedule_is_corrected_by_its_own_bin(bins):
    """Times (i+1)/1000 in float32 lie up to 3e-8 beside the bins' edges."""
    times, i = Geometric(ratio=0.97, bins=bins, corrected=True), torch.arange(1000)
    share = times._shares[i * bins // 1000]
    torch.testing.assert_close(times.correction(sd_process().grid()).double(), 1 / (bins * share), rtol=1e-5, atol=0)


def test_a_correction_reaches_plain_errors_averaged_over_draws():
    """What MaPO and SFT read: the mean over corrected draws is that of uniform times."""
    batch, model = batch_of(), Linear(policy=0.3, reference=0.2)

    def estimate(corrected):
        return DenoisingELBO(times=Geometric(ratio=0.6, corrected=corrected), draws=8)(batch, context(model), "reference")

    est, skewed = estimate(True), estimate(False)
    torch.testing.assert_close(-0.5 * est.error, est.policy)  # which the correction has always reached
    torch.testing.assert_close(-0.5 * est.reference_error, est.reference)
    assert not torch.allclose(est.error, skewed.error, rtol=1e-2)


# --- the reward scale of timestep-aware DPO ------------------------------------------------------------------------------

def test_reward_scale_by_time():
    """Card 2d: lambda(0)=1, (100)=1.022, (250)=1.046, (500)=1.109, (750)=1.279, (900)=1.570, (999)=2; mean 1.205."""
    process = sd_process()
    index = torch.tensor([0, 100, 250, 500, 750, 900, 999])
    grid = process.noise(torch.zeros(1000, 1), process.grid(), torch.zeros(1000, 1))
    scale = HighNoise()(grid, Eps(), process)
    assert scale[index].tolist() == pytest.approx([1, 1.022, 1.046, 1.109, 1.279, 1.570, 2], abs=1e-3)
    assert scale.mean().item() == pytest.approx(1.205, abs=1e-3) and (scale.diff() >= 0).all()
    flow = RectifiedFlow()
    n = flow.noise(torch.zeros(2, 1), torch.tensor([0.25, 0.75]), torch.zeros(2, 1))
    assert HighNoise()(n, Velocity(), flow).tolist() == [1.25, 1.75]
    abar = process.alphas_cumprod.sqrt()
    last = VariancePreserving((((abar - abar[-1]) * abar[0] / (abar[0] - abar[-1])) ** 2).clamp(min=2.0**-24))
    n = last.noise(torch.zeros(2, 1), torch.tensor([0.5, 1.0]), torch.zeros(2, 1))
    assert HighNoise()(n, V(), last).tolist() == [1.5, 2.0]


def test_without_its_two_parts_timestep_aware_dpo_is_dpo():
    """Card check 1, to the bit: lambda = 1, gamma = 1 and a reference that stays."""
    batch, model = batch_of(b=64, shape=(1, 2, 2)), Linear(policy=0.3, reference=0.2)
    plain, off = (Preference(estimator, Pairwise(beta=5000)).loss(batch, context(model)).per_group for estimator in
                  (DenoisingELBO(), DenoisingELBO(times=Geometric(ratio=1.0), weighting=HighNoise(strength=0.0))))
    assert torch.equal(plain, off)


@pytest.mark.parametrize("scale, loss", [(1.0, 0.386871), (1.0216, 0.381702), (1.5703, 0.268483)])
def test_reward_scale_inside_the_link(scale, loss):
    """beta 5000, changes of error -2e-4 and +1e-4: margin 2500 * 3e-4 * lambda = 0.75 lambda (card check 3)."""
    c_w, c_l = torch.tensor([0.5 * 2e-4 * scale]), torch.tensor([-0.5 * 1e-4 * scale])
    assert Logistic()(c_w, c_l, 5000.0).item() == pytest.approx(loss, abs=3e-6)


def test_reward_scale_reaches_the_logit():
    """Card check 3 through the estimator: every pair's logit is lambda(t) times what it is without."""
    batch, model, process = batch_of(b=64, shape=(1, 2, 2)), Linear(policy=0.3, reference=0.2), sd_process()
    plain, scaled = (Preference(DenoisingELBO(weighting=weighting), Pairwise(beta=50)).loss(batch, context(model))
                     .metrics["logit"] for weighting in (Simple(), HighNoise()))
    alpha, sigma = process.coefficients(DenoisingELBO().noised(batch, context(model)).t.view(64, 2)[:, 0])
    ends = (sigma / alpha).new_tensor([(1 / abar - 1) ** 0.5 for abar in process.alphas_cumprod[[0, -1]].tolist()])
    scale = 1 + (sigma / alpha - ends[0]) / (ends[1] - ends[0])
    assert scale.max() > 1.5
    torch.testing.assert_close(scaled, scale * plain, rtol=1e-4, atol=1e-6)


# --- inversions ------------------------------------------------------------------------------------------------------

def gaussian(process, param=None):
    """The optimal denoiser of N(0, 1): eps-hat = sigma x on a variance-preserving process."""
    def predict(name, xt, t, cond):
        alpha, sigma = (c.view(-1, *[1] * (xt.dim() - 1)) for c in process.coefficients(t))
        variance = alpha**2 + sigma**2
        eps, x0 = sigma * xt / variance, alpha * xt / variance
        return {"Eps": eps, "V": alpha * eps - sigma * x0, "Velocity": eps - x0}[type(param or Eps()).__name__]
    return predict


def group(x0=1.0, b=1, k=1, size=4):
    return Batch(x0=torch.full((b, k, size), x0), cond=Cond(tokens=torch.zeros(b, 1, 1)), utility=torch.ones(b, k),
                 valid=torch.ones(b, k, dtype=torch.bool), key=torch.stack([torch.arange(b), torch.zeros(b).long()], 1))


def invert(plan, index, process, param=None, predict=None, batch=None, seed=0):
    """Down to timestep(s) ``index``."""
    t = (torch.as_tensor(index).reshape(-1).double() + 1) / 1000
    batch = batch or group(b=len(t))
    keys = torch.cat([batch.key, torch.zeros(batch.groups, 1, dtype=torch.int64)], 1)
    ctx = context(predict or gaussian(process, param), process, param, seed=seed)
    return plan.draw(batch, ctx, keys, t)


class Angle:
    """A process of two levels given by their angles: alpha = cos a, sigma = sin a."""

    def coefficients(self, t):
        return torch.cos(t), torch.sin(t)


@pytest.mark.parametrize("again, factor", [(None, 0.955336), ("next", 0.994437), ("current", 0.953999)])
def test_one_step_of_a_gaussian(again, factor):
    """N(0, 1), eps-hat = sin(a) x, from angle 0.2 to 0.5: DDIM cos(0.3); ReNoise's average with the end is nearly exact."""
    process = Angle()
    ctx = context(gaussian(process), process)
    low, high = torch.tensor([0.2]), torch.tensor([0.5])
    assert _step(ctx, torch.ones(1, 1), low, high, None, again).item() == pytest.approx(factor, abs=1e-6)


def test_the_target_by_hand():
    """inpo.md check 3: x0 = 1, x_t = .9, abar = .25: tau = (.9 - .5) / sqrt(.75) = .461880, and |x0 - x0(t)|^2 is three times
    (tau - eps)^2, whatever eps is. A constant eps makes the one step from abar = .99 end at .9."""
    process = VariancePreserving(torch.tensor([0.99, 0.25]))
    (a, s), (a1, s1) = ((abar**0.5, (1 - abar) ** 0.5) for abar in (0.99, 0.25))
    eps = (0.9 - a1 / a) / (s1 - a1 * s / a)
    n = Inverted(steps=1).draw(group(), context(lambda name, xt, t, cond: torch.full_like(xt, eps), process),
                               torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, dtype=torch.float64))
    assert n.xt.unique().item() == pytest.approx(0.9, abs=1e-6)
    assert n.noise.unique().item() == pytest.approx(0.461880, abs=1e-6)
    raw = torch.full_like(n.xt, 0.1)
    torch.testing.assert_close((n.x0 - Eps().to_x0(raw, n)) ** 2, 3 * (n.noise - raw) ** 2)


def test_the_released_codes_path_of_a_gaussian():
    """inpo.md check 5: over the levels 0, 1, 101, 201, 301, 401, where the released code ends for t = 350: 0.913548 x0."""
    process, x = sd_process(), torch.ones(1, 1)
    ctx, levels = context(gaussian(process), process), [(i + 1) / 1000 for i in (0, 1, 101, 201, 301, 401)]
    for low, high in zip(levels, levels[1:]):
        x = _step(ctx, x, torch.tensor([low]), torch.tensor([high]), None, None)
    assert x.item() == pytest.approx(0.913548, abs=2e-6)


@pytest.mark.parametrize("param", [Eps(), V()])
def test_inversion_of_a_gaussian(param):
    """x_350 = product of cos(angle steps) over the levels 0, 88, 175, 263, 350 (inpo.md check 5 has 262: 0.926428)."""
    process = sd_process()
    angle = torch.arccos(process.alphas_cumprod.double().sqrt())
    truth = torch.cos(angle[[0, 88, 175, 263, 350]].diff()).prod().item()
    assert truth == pytest.approx(0.926428, abs=2e-5)
    n = invert(Inverted(steps=4), 350, process, param)
    assert n.xt.unique().item() == pytest.approx(truth, abs=1e-5)
    finer = [abs(1 - invert(Inverted(steps=s), 350, process, param).xt[0, 0].item()) for s in (10, 20, 40)]
    assert finer[0] / finer[1] == pytest.approx(2, rel=0.1) and finer[1] / finer[2] == pytest.approx(2, rel=0.1)
    assert abs(1 - invert(ReNoised(steps=4), 350, process, param).xt[0, 0].item()) < 0.01


def test_flow_inversion_of_a_gaussian():
    """The exact flow scales x by sqrt((1-t)^2 + t^2); Euler's error shrinks with the step."""
    process, t = RectifiedFlow(), 0.6
    truth = (0.4**2 + 0.6**2) ** 0.5
    errors = []
    for steps in (20, 40):
        keys = torch.zeros(1, 3, dtype=torch.int64)
        n = Inverted(steps=steps).draw(group(), context(gaussian(process, Velocity()), process, Velocity()), keys,
                                       torch.tensor([t], dtype=torch.float64))
        errors.append(abs(n.xt[0, 0].item() - truth))
    assert errors[1] < 0.6 * errors[0] < 0.02


def test_the_target_is_what_is_in_the_latent():
    """sqrt(abar) x0 + sqrt(1-abar) tau = x_t for t in {0, 1, 10, 500, 999} in one batch, each with its own grid."""
    process, index = sd_process(), [0, 1, 10, 500, 999]
    batch = Batch(**{**{f: getattr(group(b=5, k=2), f) for f in ("cond", "utility", "valid", "key")},
                     "x0": torch.randn(5, 2, 4)})
    asked = []

    def predict(name, xt, t, cond):
        asked.append((name, process.index(t)))
        return gaussian(process)(name, xt, t, cond)

    for plan in (Inverted(steps=10, eta=0.1), ReNoised(steps=3)):
        n = invert(plan, index, process, predict=predict, batch=batch)
        assert process.index(n.t).view(5, 2).tolist() == [[i, i] for i in index]
        torch.testing.assert_close(n.alpha[:, None] * n.x0 + n.sigma[:, None] * n.noise, n.xt, rtol=1e-5, atol=1e-5)
        cut = [Batch(**{f: getattr(batch, f)[j:j + 1] for f in ("x0", "utility", "valid", "key")},
                     cond=Cond(tokens=torch.zeros(1, 1, 1))) for j in range(5)]
        alone = [invert(plan, i, process, batch=one) for one, i in zip(cut, index)]
        torch.testing.assert_close(torch.cat([a.xt for a in alone]), n.xt)
    assert {name for name, _ in asked} == {"current"} and min(i.min() for _, i in asked) >= 0
    assert len(asked) == Inverted().forwards + ReNoised(steps=3).forwards


def test_extra_noise_of_inpo():
    """eta 0 is deterministic; eta 0.1 adds 0.1 sqrt((1-a0)/(1-a1) (1-a1/a0)) a step: 0.0261 (101->201), 0.0528 (401->501)."""
    from diffalign.process.solver import bridge_std
    process = sd_process()
    time = lambda *i: (torch.tensor(i).double() + 1) / 1000
    std = 0.1 * bridge_std(process, time(1, 101, 401, 801), time(101, 201, 501, 901))
    assert std.tolist() == pytest.approx([0.0041, 0.0261, 0.0528, 0.0776], abs=5e-5)
    a, b = (invert(Inverted(eta=0.1), 500, process, seed=s).xt for s in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, invert(Inverted(eta=0.1), 500, process).xt)
    assert torch.equal(*(invert(Inverted(), 500, process, seed=s).xt for s in (0, 1)))


def test_inverting_and_sampling_back():
    """Round trip with many steps: DDIM with the same model gives the image again, the better the finer."""
    from diffalign.process.solver import stochastic_step
    process, errors = sd_process(), []
    ctx = context(gaussian(process), process)
    for steps in (50, 100):
        n = invert(Inverted(steps=steps), 700, process)
        levels = torch.linspace(1 / 1000, 701 / 1000, steps + 1, dtype=torch.float64).flip(0)
        x = n.xt
        for high, low in zip(levels, levels[1:]):
            high, low = (process.snap(torch.full((1,), float(v), dtype=torch.float64)) for v in (high, low))
            x, _ = stochastic_step(ctx, x, gaussian(process)("current", x, high, None), high, low, "ddim")
        errors.append((x - 1).abs().max().item())
    assert errors[1] < 0.6 * errors[0] < 0.1


def test_no_gradient_flows_into_the_inversion():
    model = torch.nn.Parameter(torch.tensor(0.3))
    constants = []

    def predict(name, xt, t, cond):
        scale = {"policy": model, "current": model, "reference": torch.tensor(0.2)}[name]
        if name == "policy":
            constants.append(xt)
        return scale * xt

    def grad(noise):
        model.grad = None
        Preference(DenoisingELBO(noise=noise), Pairwise(beta=50)).loss(batch_of(), context(predict)).per_group.sum().backward()
        return model.grad.clone()

    class Same:
        """The latents that the inversion had found, as constants."""
        forwards = 0

        def draw(self, batch, ctx, keys, t):
            return found

    assert not (with_inversion := grad(Inverted(steps=3))).isnan() and not constants[0].requires_grad
    ctx = context(predict)
    found = DenoisingELBO(noise=Inverted(steps=3)).noised(batch_of(), ctx)
    torch.testing.assert_close(grad(Same()), with_inversion)


def test_equal_models_give_ln_2_whatever_the_inversion_returns():
    model = Linear(policy=0.3, reference=0.3, current=0.7)
    for noise in (Inverted(steps=2), ReNoised(steps=2)):
        loss = Preference(DenoisingELBO(noise=noise), Pairwise(beta=5000)).loss(batch_of(), context(model)).per_group
        assert loss.tolist() == pytest.approx([math.log(2)] * 3)
