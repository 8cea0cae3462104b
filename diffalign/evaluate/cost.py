"""What training costs, in passes of the denoiser, so that methods can be given the same."""

from __future__ import annotations

from ..data.stepwise import Stepwise
from ..likelihood import Transitions
from ..methods import Preference

BACKWARD = 2  # passes that a backward counts as: gradients of the activations and of the weights, a forward's work each


def passes_per_group(recipe, candidates: int) -> int:
    """Denoiser passes that a training step spends on one group; ``candidates``: pictures a group has in the data.

    One pass is one picture forward through one weight set. Per candidate and draw: the policy's forward, ``BACKWARD`` more for
    its gradient, one forward for each other set that the method reads, and the forwards of a noise plan that inverts; and
    those of the sampler for every candidate that the model draws itself. Every candidate goes through the model, also those
    that the objective then leaves out (SFT's losers). The probe of a gated reference, some passes a step at most, is left out.
    """
    if isinstance(recipe.source, Stepwise):
        return _stepwise(recipe)
    method, source = Preference.of(recipe.likelihood, recipe.objective, recipe.reference), recipe.source
    estimator = recipe.likelihood
    if isinstance(estimator, Transitions):
        draws, inversion = len(source.sampler.times()) - 1, 0  # the last step has no density
    else:
        draws, inversion = estimator.draws, getattr(getattr(estimator, "noise", None), "forwards", 0)  # text has no noise
    forwards = 1 + BACKWARD + len({*method.reads} - {"policy"}) + inversion
    sampling = source.drawn * source.sampler.forwards if source.drawn else 0
    return (source.k or candidates) * draws * forwards + sampling


def _stepwise(recipe) -> float:
    """A pair costs the passes of its step's shared state, and its share of the rollout, if every pair is kept."""
    source, method = recipe.source, Preference.of(recipe.likelihood, recipe.objective, recipe.reference)
    twice = 1 if source.sampler.guidance_scale == 1 else 2
    forks, children = source.forks(), source.candidates if source.judge.predicts else 0
    states = 1 if source.block == 1 else 2
    compared = len(forks) * source.block
    walked = forks[-1] + source.block  # states on the way; a judge that predicts has seen those after a fork already
    own = walked if not children else walked - len(forks) + 1
    branches = len(forks) * (source.block - 1) * (source.candidates - 1)
    predicted = sum(n + source.block not in source.finished() for n in forks) * children
    rollout = twice * (own + branches + predicted)
    judging = len(forks) * source.candidates * getattr(source.judge, "forwards", 0)
    training = twice * states * (1 + BACKWARD + len({*method.reads} - {"policy"}))
    return training + (rollout + judging) / compared


def groups_per_step(recipe) -> int:
    """Of one process."""
    return recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps
