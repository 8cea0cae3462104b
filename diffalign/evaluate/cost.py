"""What training costs, in passes of the denoiser, so that methods can be given the same."""

from __future__ import annotations

from ..methods import Preference

BACKWARD = 2  # passes that a backward counts as: gradients of the activations and of the weights, a forward's work each


def passes_per_group(recipe, candidates: int) -> int:
    """Denoiser passes that a training step spends on one group of ``candidates`` pictures.

    One pass is one picture forward through one weight set. Per candidate and draw: the policy's forward, ``BACKWARD`` more for
    its gradient, one forward for each other set that the method reads, and the forwards of a noise plan that inverts pictures.
    Every candidate goes through the model, also those that the objective then leaves out (SFT's losers).
    """
    others = len({*Preference(recipe.likelihood, recipe.objective).reads} - {"policy", "current"})  # current: see inversion
    inversion = getattr(recipe.likelihood.noise, "forwards", 0)
    return candidates * recipe.likelihood.draws * (1 + BACKWARD + others + inversion)


def groups_per_step(recipe) -> int:
    """Of one process."""
    return recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps
