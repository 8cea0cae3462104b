"""Scores of a latent reward model in the place of likelihoods: how such a model is trained by the objectives there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..process import Independent, NoisePlan, Random, Sequence, Times, Uniform
from ..types import Batch, Estimate, Noised
from .denoising import DenoisingELBO


@dataclass(frozen=True, kw_only=True)
class LatentScores:
    """s(x_t, c, t) of every candidate, in logits, by a denoiser turned into a reward (``models/latent_reward.py``).

    The policy is that reward; nothing is a reference. One time a pair, at all noise levels; noise and posterior draw are each
    picture's own, as in the Latent Reward Model's code (arXiv 2502.01051; lpo_lrm.md 2b). SPO's judge shares the noise.
    guidance_scale: of the visual feature enhancement, 1 for none. text_projection: of SD 1.x, see ``from_denoiser``.
    """

    noise: NoisePlan = Independent()
    times: Times = Uniform()
    sequence: Sequence = Random()
    guidance_scale: float = 7.5
    text_projection: str | None = None
    draws = 1
    title = "Latent Reward Model"

    def __post_init__(self):
        if self.noise.forwards:
            raise ValueError("noise that inverts with the denoiser needs one; a reward has shared or independent noise")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must be at least 0 and at most 100, got {self.guidance_scale}")

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None = None, anchor: str | None = None
                 ) -> Estimate:
        """batch: B groups of K -> Estimate whose ``policy`` [B, K] holds scores. A score has no denoising error: NaN."""
        if against or anchor:
            raise ValueError("a reward has no reference and no base to be anchored to")
        noised = self.noised(batch, ctx)
        scores = ctx.predict("policy", noised.xt, noised.t, batch.cond.rows(batch.k)).float().view(batch.groups, batch.k)
        correction = self.times.correction(noised.t)
        return Estimate(policy=scores, reference=None, error=torch.full_like(scores, torch.nan), reference_error=None,
                        t=noised.t.view_as(scores),
                        importance=None if correction is None else correction.to(scores.device).view_as(scores)[:, 0])

    def noised(self, batch: Batch, ctx) -> Noised:
        """The noisy candidates of a batch, rows ordered (group, candidate): a function of keys, places and seed."""
        return DenoisingELBO(noise=self.noise, times=self.times, sequence=self.sequence).noised(batch, ctx)
