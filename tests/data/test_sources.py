"""Groups that the model completes: winners beside samples, and samples ranked by a reward."""

import pytest
import torch

from diffalign.data.sources import Online, Sampled, SemiPolicy
from diffalign.objectives import KTO, BestWorst, Pairwise
from diffalign.sampling.latents import Sampler
from diffalign.types import Batch, Cond, Estimate, Memory

SHAPE = (2, 4)


class Stored:
    """Two micro-batches of a step: pairs whose winner is at another place in every other group."""

    identity, k, soft, groups, elements = "stored", 2, False, 4, 8

    def take(self, step):
        return [self.batch(step * 4 + start) for start in (0, 2)]

    def batch(self, row):
        key = torch.stack([torch.arange(row, row + 2), torch.zeros(2).long()], 1)
        x0 = torch.stack([torch.full((2, *SHAPE), 10.0 * r) for r in range(row, row + 2)])
        x0[:, 1] += 1
        ids = torch.arange(2 * 2 * 6, dtype=torch.float32).view(2, 2, 6)
        return Batch(x0=x0, cond=Cond(tokens=key[:, :1, None].float(), extra={"time_ids": ids}), key=key, place=key[:, 0],
                     utility=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), valid=torch.ones(2, 2, dtype=torch.bool))

    def prompts(self, step):
        return [[f"prompt {r}" for r in batch.key[:, 0].tolist()] for batch in self.take(step)]


def draw(cond, keys, shape):
    """A sample is its key: 100 * row + candidate."""
    x0 = (100.0 * keys[:, 0] + keys[:, 2]).view(-1, 1, 1).expand(-1, *shape).clone()
    draw.time_ids = cond.extra["time_ids"]
    return x0, torch.stack([x0 - 2, x0 - 1], dim=1)


def test_the_sample_takes_the_losers_place():
    batches = Sampled(Stored(), SemiPolicy(), draw).take(1)
    batch = batches[1]  # rows 6 and 7
    assert batch.x0[:, 0, 0, 0].tolist() == [60.0, 71.0]  # the winners, at place 0 and place 1
    assert batch.x0[:, 1, 0, 0].tolist() == [600.0, 700.0]
    assert batch.utility.tolist() == [[1, 0], [1, 0]] and batch.valid.all() and batch.soft is None
    ids = Stored().batch(6).cond.extra["time_ids"]
    assert torch.equal(batch.cond.extra["time_ids"], torch.stack([ids[0, :1].repeat(2, 1), ids[1, 1:].repeat(2, 1)]))
    assert torch.equal(draw.time_ids, torch.stack([ids[0, 0], ids[1, 1]]))  # drawn under the winner's own sizes
    assert batch.place.tolist() == [6, 7] and batch.steps is None


@pytest.mark.parametrize("utility, valid, kept", [
    ([[1.0]], [[True]], True), ([[-1.0]], [[True]], False), ([[0.2, 0.1]], [[True, False]], True),
    ([[1.0, 0.0]], [[False] * 2], False), ([[0.5, 0.5]], [[True] * 2], False)])
def test_a_group_without_a_winner_is_left_out(utility, valid, kept):
    class One(Stored):
        def take(self, step):
            k = len(utility[0])
            return [Batch(x0=torch.zeros(1, k, *SHAPE), cond=Cond(tokens=torch.zeros(1, 1, 1)), utility=torch.tensor(utility),
                          valid=torch.tensor(valid), key=torch.zeros(1, 2, dtype=torch.int64))]

    def plain(cond, keys, shape):
        return torch.zeros(len(keys), *shape), torch.zeros(len(keys), 1, *shape)

    assert Sampled(One(), SemiPolicy(), plain).take(0)[0].valid.tolist() == [[kept, kept]]


def test_samples_are_ranked_and_what_cannot_be_scored_is_left_out():
    asked = []

    def score(x0, prompts):
        asked.append(prompts)
        values = -x0[:, 0, 0].clone()
        values[0] = torch.nan
        return values

    source = Sampled(Stored(), Online(reward="any", k=3), draw, score, levels=torch.tensor([1.0, 0.5]))
    batch = source.take(0)[0]  # two levels: one step, so one group for each group
    assert asked[0] == ["prompt 0"] * 3 + ["prompt 1"] * 3
    assert batch.x0[:, :, 0, 0].tolist() == [[0, 1, 2], [100, 101, 102]]
    assert batch.valid.tolist() == [[False, True, True], [True] * 3] and torch.isfinite(batch.utility).all()
    assert batch.utility[1].tolist() == [-100, -101, -102] and batch.steps.x_s.shape == (2, 3, *SHAPE)
    assert batch.steps.t.tolist() == [1, 1] and batch.steps.s.tolist() == [0.5, 0.5] and batch.steps.solver == "ddim"
    assert batch.cond.extra["time_ids"].shape == (2, 3, 6)
    assert source.k == 3 and not source.pure and source.boundary(0) and source.identity == "stored"
    assert Sampled(Stored(), Online(reward="any"), draw, score).take(0)[0].steps is None


@pytest.mark.parametrize("scores, kept", [
    ([1.0, 1.0, 1.0], [False] * 3), ([torch.nan, 20.0, torch.nan], [False] * 3), ([torch.nan] * 3, [False] * 3),
    ([0.0, 0.0, 1.0], [True] * 3), ([torch.nan, 0.0, 1.0], [False, True, True])])
def test_a_group_that_says_nothing_is_no_group(scores, kept):
    """online_dpo.md trap 1 and check 3: ties are skipped, or they dilute the step's mean; nor is the only picture that could
    be scored one that somebody likes."""
    source = Sampled(Stored(), Online(reward="any", k=3), draw, lambda x0, prompts: torch.tensor(scores + [1.0, 2.0, 3.0]))
    batch = source.take(0)[0]
    assert batch.valid.tolist() == [kept, [True] * 3]
    loss = Pairwise(beta=1.0, reference_free=True)(estimate(batch), batch, Memory()).per_group
    assert loss[1] > 0 and (loss[0] > 0) == any(kept)
    liked = KTO(beta=1.0, baseline=False)(estimate(batch), batch, Memory()).per_group
    assert (liked[0] > 0) == any(kept)


def test_the_worst_of_equals_is_the_first():
    """online_dpo.md check 3: of R = (0, 0, 1, 0) the winner is 2 and the loser, by a fixed rule, 0."""
    source = Sampled(Stored(), Online(reward="any", k=4), draw, lambda x0, prompts: torch.tensor([0.0, 0, 1, 0] * 2))
    batch = source.take(0)[0]
    assert [x.tolist() for x in BestWorst()(batch)] == [[0, 1], [2, 2], [0, 0]]


def estimate(batch):
    zero = torch.zeros_like(batch.utility)
    return Estimate(policy=zero, reference=zero, error=zero, reference_error=zero, t=zero)


@pytest.mark.parametrize("build, words", [
    (lambda: Online(reward="scenes", k=1), "k must"), (lambda: Sampler(steps=0), "steps must"),
    (lambda: Sampler(timesteps=(1, 2)), "timesteps must fall"), (lambda: Sampler(timesteps=()), "timesteps must"),
    (lambda: Sampler(guidance_scale=-1.0), "guidance_scale")])
def test_bad_options(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_what_a_sample_costs():
    assert Sampler(steps=7).forwards == 7 and Sampler(timesteps=(999, 499), guidance_scale=3.0).forwards == 4
