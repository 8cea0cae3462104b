"""LPO's rollouts: the level a child is judged at, and check 7 of lpo_lrm.md with a judge of latents."""

import pytest
import torch

from diffalign.config import build_recipe
from diffalign.data.judges import LatentJudge
from diffalign.data.stepwise import Constant, Dynamic
from diffalign.errors import ConfigError
from diffalign.evaluate.cost import passes_per_group

from ..golden.test_likelihood import sd_process
from .test_stepwise import PUBLISHED, Judge, mean, source


class Late(Judge):
    time = "parent"


def numbers(levels):
    return sd_process().index(torch.tensor(levels)).tolist()


@pytest.mark.parametrize("judge, first, last", [(Judge(mean), 901, 0), (Late(mean), 951, 1)])
def test_children_are_judged_at_their_own_level_or_their_parents(judge, first, last):
    """Trap 1: the released code scores x at t - 50 with the timestep t; trained was its own."""
    source(judge, threshold=Dynamic()).take(0)
    asked = numbers(judge.levels)
    assert (asked[0], asked[-1]) == (first, last)
    assert set(asked) == set(PUBLISHED[:-1] if judge.__class__ is Late else PUBLISHED[1:])


def test_a_block_ends_one_step_before_its_last_state():
    """With blocks, the parent of what is judged is the state one step earlier, not the one that forked."""
    judge = Late(mean)
    source(judge, block=4, candidates=2, start=0.752).take(0)
    assert set(numbers(judge.levels)) == {601, 401, 201, 1}


def kept(judge, threshold):
    return [batch for batch in source(judge, threshold=threshold).take(0) if bool(batch.valid.any())]


def test_a_judge_that_knows_nothing_keeps_no_pair():
    """Check 7: a constant passes no threshold, not even 0."""
    constant = Judge(lambda x, t: torch.zeros(len(x)))
    assert not kept(constant, Constant(gap=0.0)) and not kept(constant, Dynamic())


def test_the_negative_judge_swaps_winner_and_loser():
    """Check 7, on the first step, whose states are the same for both judges."""
    def first(sign):
        batch, = kept(Judge(lambda x, t: sign * 100 * mean(x, t)), Constant(gap=0.0))
        steps = batch.steps.t == batch.steps.t.max()
        order = batch.key[steps].argsort(dim=0)[:, 0]
        return batch.steps.x_s[steps][order]

    plain, negative = first(1), first(-1)
    assert len(plain) and torch.equal(plain, negative.flip(1))


def recipe(**changes):
    tree = {"output_dir": "run", "model": {"pretrained_model_name_or_path": "base"}, "data": {"path": "pairs.parquet"},
            "objective": {"kind": "dpo", "beta": 500, "clip": 0.1}, "likelihood": "transitions",
            "source": {"kind": "stepwise", "judge": {"kind": "latent", "path": "reward"}, "threshold": {"kind": "dynamic"}}}
    return build_recipe({**tree, **changes})


def test_recipe():
    judge = recipe().source.judge
    assert judge == LatentJudge(path="reward") and judge.time == "own" and not judge.predicts
    with pytest.raises(ConfigError, match="source.judge.time"):
        recipe(source={"kind": "stepwise", "judge": {"kind": "latent", "path": "reward", "time": "late"}})


@pytest.mark.parametrize("judge, start, passes", [
    ({"kind": "predicted_image", "reward": "scenes"}, 0.752, 4 + 65 / 16), ({"kind": "latent", "path": "reward"}, 1.0, 9)])
def test_passes_of_a_pair(judge, start, passes):
    """The shared state's 1 + 2 + 1 passes, and a share of the rollout. SPO's: five states before and at the first fork, then
    four children at each of 15 levels; at timestep 0 none. LPO's: 20 states and 80 judgements of a pass each, for 20 pairs."""
    source = {"kind": "stepwise", "judge": judge, "start": start,
              "sampler": {"solver": "ancestral", "timesteps": list(PUBLISHED)}}
    assert passes_per_group(recipe(source=source), 2) == passes


LRM = {"likelihood": {"kind": "latent_reward"}, "objective": {"kind": "dpo", "beta": 1, "reference_free": True},
       "source": {"kind": "stored"}, "model": {"pretrained_model_name_or_path": "base", "lora": None}}


@pytest.mark.parametrize("change, words", [
    ({"objective": {"kind": "dpo", "beta": 1}}, "objective: .*reference_free: true"),
    ({"objective": {"kind": "sft"}}, "objective: .*reference_free: true"),
    ({"model": {"pretrained_model_name_or_path": "base"}}, "model.lora: .*null"),
    ({"source": {"kind": "online", "reward": "scenes"}}, "source.kind: .*stored"),
    ({"evaluate": {"prompts": "p.txt"}}, "evaluate: .*null"),
    ({"likelihood": {"kind": "latent_reward", "noise": "inverted"}}, "likelihood.noise: ")])
def test_recipes_of_a_latent_reward_that_make_no_sense(change, words):
    assert recipe(**LRM).likelihood.title == "Latent Reward Model"
    with pytest.raises(ConfigError, match=words):
        recipe(**{**LRM, **change})
