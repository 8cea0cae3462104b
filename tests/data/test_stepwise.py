"""Pairs at every step of a rollout: the numbers of lpo_lrm.md section 9, spo.md section 9 and tailorpo.md section 9."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from scipy.stats import chisquare

from diffalign.data.stepwise import Constant, Dynamic, PredictedImage, Stepwise, StepwiseSource
from diffalign.likelihood import Transitions
from diffalign.methods import Preference
from diffalign.objectives import Pairwise
from diffalign.process.solver import bridge_std, stochastic_step
from diffalign.sampling.latents import Sampler
from diffalign.types import Batch, Cond, Estimate, Memory, Steps

from ..golden.test_likelihood import context, sd_process
from ..golden.test_noise_plans import gaussian
from .test_sources import SHAPE
from .test_sources import Stored as Pairs

PUBLISHED = (951, 901, 851, 801, 751, 701, 651, 601, 551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1, 0)
STD = [0.6444, 0.6241, 0.6029, 0.5807, 0.5576, 0.5336, 0.5087, 0.4829, 0.4565, 0.4293, 0.4016, 0.3732, 0.3442, 0.3144, 0.2836,
       0.2509, 0.2144, 0.1673, 0.0406, 0.0206]
LIMITS = [0.5, 0.4951, 0.49, 0.4847, 0.4791, 0.4734, 0.4674, 0.4612, 0.4548, 0.4483, 0.4416, 0.4348, 0.4278, 0.4206, 0.4132,
          0.4054, 0.3966, 0.3853, 0.3548, 0.35]


class Stored(Pairs):
    def unconditional(self):
        return Cond(tokens=torch.zeros(1, 1, 1))


@dataclass
class Judge:
    """score(x, t): whatever a test wants; remembers what it was asked."""

    score: object
    predicts: bool = False

    def __post_init__(self):
        self.levels, self.prompts = [], []

    def __call__(self, x, t, x0, prompts, decode):
        self.levels.append(t[0].item())
        self.prompts += prompts
        assert (x0 is not None) == self.predicts
        return self.score(x, t)


def mean(x, t):
    return x.flatten(1).mean(1)


def source(judge, stored=None, predict=None, pairs=1000, **options):
    process = sd_process()
    common = {"sampler": Sampler(solver="ancestral", timesteps=PUBLISHED), "threshold": Constant(gap=0.0)}
    spec = Stepwise(judge=judge, **{**common, **options})
    return StepwiseSource(stored or Stored(), spec, lambda: context(predict or gaussian(process), process), lambda x: x,
                          pairs=pairs, device=torch.device("cpu"))


def test_the_released_tables_for_any_schedule():
    """lpo_lrm.md section 3 and check 1: computed from the schedule, they are the released ones to 1e-4."""
    process = sd_process()
    levels = Sampler(timesteps=PUBLISHED).levels(process)
    std = bridge_std(process, levels[1:], levels[:-1])
    assert std.tolist() == pytest.approx(STD, abs=1e-4)
    assert Dynamic()(std).tolist() == pytest.approx(LIMITS, abs=1e-4)
    assert Dynamic(low=0.45, high=0.6)(std).tolist() == pytest.approx([limit + 0.1 for limit in LIMITS], abs=1e-4)
    assert Constant(gap=0.4)(std).tolist() == pytest.approx([0.4] * 20)


@pytest.mark.parametrize("gap, kept", [(0.5, []), (0.7, [0.3]), (1.0, [0.3, 0.4])])
def test_the_gap_is_that_of_the_softmax(gap, kept):
    """spo.md check 4: gaps 0.5, 0.7, 1.0 are 0.2449, 0.3364, 0.4621; the limits are 0.3 and 0.4."""
    assert [limit for limit in (0.3, 0.4) if math.tanh(gap / 2) > limit] == kept
    two = Judge(lambda x, t: torch.tensor([0.0, gap] * (len(x) // 2)))
    for limit in (0.3, 0.4):
        batch = torch.cat([b.valid for b in source(two, candidates=2, threshold=Constant(gap=limit)).take(0)])
        assert bool(batch.all()) == (limit in kept)


def test_bookkeeping():
    """spo.md check 5: from 751 on, 16 transitions with one parent each, or 4 comparisons of 4 transitions."""
    plain = Stepwise(judge=Judge(mean), sampler=Sampler(solver="ancestral", timesteps=PUBLISHED), start=0.752)
    assert plain.forks() == list(range(4, 20))
    assert replace(plain, block=4, candidates=2).forks() == [4, 8, 12, 16]
    batch, = source(Judge(mean), start=0.752).take(0)
    assert batch.groups == 4 * 16 and batch.steps.x_t.shape == (64, 1, *SHAPE) and batch.steps.x_s.shape == (64, 2, *SHAPE)
    assert sorted({round(1000 * t - 1) for t in batch.steps.t.tolist()}) == sorted(PUBLISHED[4:20])
    blocks, = source(Judge(mean), start=0.752, block=4, candidates=2).take(0)
    assert blocks.groups == 64 and blocks.steps.x_t.shape == (64, 2, *SHAPE)
    first = blocks.steps.t == blocks.steps.t.max()
    shared = blocks.steps.x_t[first]
    assert torch.equal(shared[:, 0], shared[:, 1]) and not torch.equal(blocks.steps.x_t[:, 0], blocks.steps.x_t[:, 1])
    for step in range(1, 4):  # a branch goes on from where it came to
        now, before = (blocks.steps.t.sub((PUBLISHED[4 + i] + 1) / 1000).abs() < 1e-6 for i in (step, step - 1))
        where = {key: i for i, key in enumerate(blocks.key[before].unbind())}
        assert len(where) == 4
        for key, x in zip(blocks.key[now], blocks.steps.x_t[now], strict=True):
            old = (blocks.key[before] == key).all(1).nonzero().item()
            assert torch.equal(x, blocks.steps.x_s[before][old])


def test_the_judge_is_asked_at_the_childs_own_level():
    """spo.md check 7: 701, 651, ..., 1, 0."""
    judge = Judge(mean)
    source(judge, start=0.752).take(0)
    assert [round(1000 * t - 1) for t in judge.levels[:16]] == list(PUBLISHED[5:])
    assert judge.prompts[:8] == ["prompt 0"] * 4 + ["prompt 1"] * 4


def test_winner_loser_and_their_reverse():
    batch, = source(Judge(mean)).take(0)
    scores = batch.steps.x_s.flatten(2).mean(2)
    assert (batch.utility[:, 0] > batch.utility[:, 1]).all() and torch.allclose(scores, batch.utility, atol=1e-6)
    other, = source(Judge(lambda x, t: -mean(x, t))).take(0)
    order, reverse = (torch.argsort(b.steps.t * 1000 + b.key[:, 0]) for b in (batch, other))
    assert torch.equal(batch.steps.x_s[order], other.steps.x_s[reverse].flip(1))  # one continuation, whatever the scores


def test_a_constant_judge_keeps_nothing():
    """lpo_lrm.md check 7, tailorpo.md check 7: no pair, and a loss that is zero and finite."""
    batch, = source(Judge(lambda x, t: torch.ones(len(x)))).take(0)
    assert batch.groups == 1 and not batch.valid.any()
    loss = Preference(Transitions(), Pairwise(beta=10)).loss(batch, context(gaussian(sd_process()))).per_group
    assert loss.tolist() == [0.0]


def test_unscored_children_are_left_out():
    def score(x, t):
        scores = mean(x, t)
        scores[::4] = torch.nan
        return scores
    batch, = source(Judge(score)).take(0)
    whole, = source(Judge(mean)).take(0)
    assert batch.utility.isfinite().all() and batch.groups == whole.groups
    none, = source(Judge(lambda x, t: torch.full((len(x),), torch.nan))).take(0)
    assert not none.valid.any()


def test_continuation():
    """spo.md check 6: uniform over the children whatever their scores; "best" takes the winner."""
    class Many(Stored):
        def take(self, step):
            return [self.batch(2 * n) for n in range(60)]

    options = {"sampler": Sampler(solver="ancestral", steps=4), "stored": Many()}
    best, = source(Judge(mean), continuation="best", **options).take(0)
    order = torch.argsort(best.steps.t, descending=True, stable=True)
    for row in best.key[:6]:
        mine = [i for i in order.tolist() if torch.equal(best.key[i], row)]
        for before, after in zip(mine, mine[1:]):
            assert torch.equal(best.steps.x_t[after, 0], best.steps.x_s[before, 0])
    seen = []
    judge = Judge(lambda x, t: seen.append(x) or mean(x, t))
    batch, = source(judge, **options).take(0)
    counts = torch.zeros(4)
    for group in range(len(batch.key)):
        parent = batch.steps.x_t[group, 0]
        for x in seen:
            hit = (x == parent).flatten(1).all(1).nonzero()
            if len(hit):
                counts[hit.item() % 4] += 1
    assert counts.sum() == 120 * 2 and chisquare(counts.numpy()).pvalue > 1e-3


def test_densities_are_the_samplers():
    """(x_s - mean)/std of the model that drew is the injected noise: a mean square of 1 over random children."""
    batch, = source(Judge(lambda x, t: torch.arange(len(x)).float()), candidates=2).take(0)  # order without a look at x
    est = Transitions()(batch, context(gaussian(sd_process())), "reference")
    assert est.error.mean().item() == pytest.approx(1.0, abs=4 * (2 / (est.error.numel() * 8)) ** 0.5)
    loss = Preference(Transitions(), Pairwise(beta=500, clip=0.1)).loss(batch, context(gaussian(sd_process())))
    assert loss.per_group.tolist() == pytest.approx([math.log(2)] * batch.groups)


def test_margin_identity():
    """lpo_lrm.md check 3, tailorpo.md check 4: l_w = 0.037173, l_l = -0.041094; at beta 10 (mean of squares over 2 std^2, so
    ours is twice: beta counts 1/2 of the error) the margin is 0.78267 and the loss 0.376506."""
    process = sd_process()
    t, s = (process.snap(torch.tensor([(i + 1) / 1000])) for i in (501, 451))
    z = torch.tensor([[1.0, 0.0, -1.0, 0.5], [-0.5, 1.0, 0.0, -1.0]])
    change = torch.tensor([-0.1, 0.1, 0.1, -0.1])
    x = torch.tensor([[0.3, -0.2, 0.1, 0.4]])
    ctx = context(lambda name, xt, t, cond: 0.5 * xt + (change if name == "policy" else 0), process)
    centre, std = stochastic_step(ctx, x, 0.5 * x, t, s, "ancestral")
    assert std.item() == pytest.approx(0.4293, abs=1e-4)
    batch = Batch(x0=torch.zeros(1, 2, 4), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([[1.0, 0.0]]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64),
                  steps=Steps(x_t=x[None], x_s=(centre + std * z)[None], t=t, s=s, solver="ancestral"))
    est = Transitions()(batch, ctx, "reference")
    ratio = est.log_ratio[0]
    assert ratio.tolist() == pytest.approx([0.037173, -0.041094], abs=2e-5)
    loss = Preference(Transitions(), Pairwise(beta=10)).loss(batch, ctx)
    assert loss.metrics["logit"].item() == pytest.approx(0.78267, abs=3e-4)
    assert loss.per_group.item() == pytest.approx(0.376506, abs=2e-4)


def test_a_rollout_depends_on_its_own_keys_alone():
    whole, = source(Judge(mean)).take(0)
    again, = source(Judge(mean)).take(0)
    assert torch.equal(whole.steps.x_s, again.steps.x_s)

    class Half(Stored):
        def take(self, step):
            return [super().take(step)[1]]
    half, = source(Judge(mean), Half()).take(0)
    mine = (whole.key[:, 0] >= 2)
    order, reverse = (torch.argsort(b.steps.t * 1000 + b.key[:, 0]) for b in (half, replace_rows(whole, mine)))
    assert torch.allclose(half.steps.x_s[order], whole.steps.x_s[mine][reverse], atol=1e-6)


def replace_rows(batch, rows):
    return replace(batch, key=batch.key[rows], steps=replace(batch.steps, t=batch.steps.t[rows]))


def test_rounds_share_a_rollout_and_split_it():
    """updates=3: three steps read one rollout, every pair once; a checkpoint is exact between rollouts alone."""
    whole, = source(Judge(mean)).take(0)
    asked = Judge(mean)
    parts = source(asked, updates=3)
    found = torch.cat([b.steps.x_s for step in range(3) for b in parts.take(step)])
    assert len(asked.levels) == 2 * 20  # two micro-batches of prompts, walked once
    assert len(found) == whole.groups and {tuple(x.flatten().tolist()) for x in found} == {
        tuple(x.flatten().tolist()) for x in whole.steps.x_s}
    assert [parts.boundary(step) for step in range(5)] == [True, False, False, True, False]
    small = source(Judge(mean), pairs=7).take(0)
    assert [b.groups for b in small] == [7] * 11 + [3]


def test_every_process_has_as_many_micro_batches():
    """A process that kept less pads with groups that count nothing."""
    process = sd_process()
    spec = Stepwise(judge=Judge(mean), sampler=Sampler(solver="ancestral", timesteps=PUBLISHED), threshold=Constant(gap=0.0))
    padded = StepwiseSource(Stored(), spec, lambda: context(gaussian(process), process), lambda x: x, pairs=40,
                            device=torch.device("cpu"), most=lambda n: n + 2).take(0)
    assert [int(b.valid.all(1).sum()) for b in padded] == [40, 40, 0, 0]


def test_a_finished_latent_is_judged_as_it_is():
    """spo.md 2b.5: after the last step the latents themselves, with timestep 0; before it what is predicted of them. Of the
    child that goes on the prediction is the next step's own: 4 passes without comparison, one at the first fork, 4 a state."""
    process, asked = sd_process(), []

    def predict(name, xt, t, cond):
        asked.append((round(1000 * t[0].item()) - 1, len(xt)))
        return gaussian(process)(name, xt, t, cond)

    class Spy(Judge):
        def __call__(self, x, t, x0, prompts, decode):
            self.same = torch.equal(x, x0)
            return super().__call__(x, t, x0, prompts, decode)

    judge = Spy(mean, predicts=True)
    source(judge, predict=predict, start=0.752).take(0)
    assert round(1000 * judge.levels[15]) - 1 == 0 and judge.same
    one = asked[:len(asked) // 2]
    assert [t for t, _ in one] == list(PUBLISHED[:20]) and {n for _, n in one[:5]} == {2} and {n for _, n in one[5:]} == {8}


@dataclass(frozen=True)
class Red:
    """Mean of the first channel."""

    sign: float = 1.0
    name = "red"
    differentiable = True

    def __call__(self, images, prompts):
        return torch.stack([self.sign * image[0].mean() for image in images])


def test_predicted_image_and_its_push():
    """The reward sees the picture predicted from the child. tailorpo.md check 5: a push raises the winner's reward, push 0 is
    the plain method bit for bit, and the push is a fifth of std * sqrt(D)."""
    plain, = source(PredictedImage(reward=Red()), candidates=2).take(0)
    pushed, = source(PredictedImage(reward=Red()), candidates=2, push=0.2).take(0)
    off, = source(PredictedImage(reward=Red()), candidates=2, push=0.0).take(0)
    assert torch.equal(off.steps.x_s, plain.steps.x_s)
    apart = pushed.steps.x_s - plain.steps.x_s
    assert (apart[:, 1] == 0).all() and (apart[:, 0, 0] > 0).all() and (apart[:, 0, 1] == 0).all()
    process = sd_process()
    std = bridge_std(process, plain.steps.s, plain.steps.t)
    assert torch.allclose(apart[:, 0].flatten(1).norm(dim=1), 0.2 * std * 8 ** 0.5, rtol=1e-3)
    swapped, = source(PredictedImage(reward=Red(sign=-1.0)), candidates=2).take(0)
    order, reverse = (torch.argsort(b.steps.t * 1000 + b.key[:, 0]) for b in (plain, swapped))
    assert torch.equal(plain.steps.x_s[order], swapped.steps.x_s[reverse].flip(1))


def test_guidance():
    """Guided rollout, guided density: the sampling model still finds its own unit noise."""
    process = sd_process()
    own = gaussian(process)

    def predict(name, xt, t, cond):
        return own(name, xt, t, cond) * (1 + 0.1 * cond.tokens.view(-1, 1, 1).sign())

    guided = Sampler(solver="ancestral", timesteps=PUBLISHED, guidance_scale=3.0)
    batch, = source(Judge(lambda x, t: torch.arange(len(x)).float()), predict=predict, sampler=guided, candidates=2).take(0)
    assert batch.steps.unconditional.tokens.shape == (batch.groups, 1, 1) and batch.steps.guidance_scale == 3
    est = Transitions()(batch, context(predict), None)
    assert est.error.mean().item() == pytest.approx(1.0, abs=4 * (2 / (est.error.numel() * 8)) ** 0.5)


def test_clamp():
    """lpo_lrm.md check 4: 0.12 counts as log 1.1 = 0.09531 without gradient; the largest margin is 0.20067 beta."""
    ratio = torch.tensor([[0.12, -0.2]], requires_grad=True)
    zero = torch.zeros(1, 2)
    est = Estimate(policy=ratio, reference=zero, error=ratio, reference_error=zero, t=zero)
    batch = Batch(x0=torch.zeros(1, 2, 1), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor([[1.0, 0.0]]),
                  valid=torch.ones(1, 2, dtype=torch.bool), key=torch.zeros(1, 2, dtype=torch.int64))
    loss = Pairwise(beta=10, clip=0.1)(est, batch, Memory())
    assert loss.metrics["logit"].item() == pytest.approx(2.0067, abs=1e-4)
    assert loss.per_group.item() == pytest.approx(0.1261, abs=1e-4)  # spo.md 2c: the least loss that can be
    loss.per_group.sum().backward()
    assert ratio.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("options, words", [
    ({"candidates": 1}, "candidates must"), ({"block": 0}, "block must"), ({"start": 0.2, "end": 0.3}, "start must be above"),
    ({"push": 0.1}, "differentiable"), ({"sampler": Sampler()}, "no density"), ({"updates": 0}, "updates must"),
    ({"sampler": Sampler(solver="ancestral", steps=3), "block": 4}, "needs 4 steps"),
    ({"sampler": Sampler(solver="ancestral", steps=1)}, "leave no step")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Stepwise(judge=Judge(mean), **options)


@pytest.mark.parametrize("build, words", [
    (lambda: Constant(gap=1.0), "gap must"), (lambda: Dynamic(low=0.5, high=0.4), "low must"),
    (lambda: Sampler(solver="ancestral", eta=0.0), "eta must"), (lambda: Sampler(solver="lcm", eta=0.5), "eta must")])
def test_bad_numbers(build, words):
    with pytest.raises(ValueError, match=words):
        build()
