"""The ELBO-based log-likelihood estimate of a Gaussian diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..process import NoisePlan, Random, Sequence, Shared, Times, Uniform, draw_keys
from ..types import Batch, Estimate, Noised
from .base import shares
from .weighting import Simple, Weighting


@dataclass(frozen=True, kw_only=True)
class DenoisingELBO:
    """log p(x0 | c) up to a constant, as ``-1/2 * W(t) * mean squared error``, in nats per latent element.

    With the 'elbo' weighting (normalise=False, max=None) and times uniform in (0, 1), independent of ``draws``, the difference
    of two estimates is an unbiased estimate of the difference of two likelihood bounds divided by the number of elements
    (notation.md section 4). The density of other times is an implicit weight on top, unless they are ``corrected``: with one
    draw the correction multiplies the loss, so that E[link] is that of uniform times; with several it goes into their means.
    ``draws`` times and noises are averaged inside the estimate, hence inside the link. ``sequence``: how the times of a run
    lie to each other. References see the very same noise and go first, without gradients; not at all where the batch brings
    their errors (``Batch.reference_error``).
    """

    noise: NoisePlan = Shared()
    times: Times = Uniform()
    sequence: Sequence = Random()
    weighting: Weighting = Simple()
    draws: int = 1

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None, anchor: str | None = None) -> Estimate:
        """batch: B groups of K -> Estimate, all [B, K].

        against: name of the reference weight set, or several with shares that sum to 1, which stand for their geometric mean;
        None or empty for no reference. anchor: weight set whose distance from the policy is estimated, or None.
        """
        against = shares(against)
        noised = self.noised(batch, ctx)
        cond = batch.cond.rows(batch.k, self.draws)
        live = against if batch.reference_error is None else {}
        raws = {name: self._raw(name, noised, cond, ctx) for name in dict.fromkeys((*live, *filter(None, (anchor,))))}
        errors = {name: self._error(noised, raws[name], batch, ctx) for name in live}
        raw = self._raw("policy", noised, cond, ctx)
        error = self._error(noised, raw, batch, ctx)
        weight = self._fold(self.weighting(noised, ctx.param, ctx.process), batch)
        importance = self._importance(noised, batch)
        factor = 1.0
        if importance is not None and self.draws > 1:
            factor, importance = importance, None

        def mean(rows: Tensor) -> Tensor:
            return (rows * factor).mean(0)

        def surrogate(error: Tensor) -> Tensor:
            return mean(-0.5 * weight * error)

        reference_error = None
        if against:
            reference_error = (sum(share * errors[name] for name, share in live.items()) if live
                               else batch.reference_error.movedim(-1, 0))
        distance = None if anchor is None else self._mean_square(raw - raws[anchor], batch)
        return Estimate(
            policy=surrogate(error), error=mean(error), t=self._fold(noised.t, batch).mean(0),
            reference=None if reference_error is None else surrogate(reference_error),
            reference_error=None if reference_error is None else mean(reference_error),
            anchor=None if distance is None else -surrogate(distance),
            importance=None if importance is None else importance[0, :, 0])

    def error(self, name: str, batch: Batch, ctx) -> Tensor:
        """[B, K, draws], mean squared error per element under one weight set, before weighting."""
        noised = self.noised(batch, ctx)
        raw = self._raw(name, noised, batch.cond.rows(batch.k, self.draws), ctx)
        return self._error(noised, raw, batch, ctx).movedim(0, -1)

    def noised(self, batch: Batch, ctx) -> Noised:
        """The noisy candidates of a batch, rows ordered (draw, group, candidate): a function of keys, places and seed."""
        return self.noise.draw(batch, ctx, *self.times_of(batch, ctx.seed))

    def times_of(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """keys [draws*B, 3] and times [draws*B] float64 of every (draw, group), draws outermost, on the CPU."""
        keys, index = draw_keys(batch.key, self.draws), None
        if batch.place is not None:
            index = (batch.place.cpu() * self.draws).repeat(self.draws) + keys[:, -1]
        return keys, self.times.at(self.sequence.draw(seed, keys, index))

    def _importance(self, noised: Noised, batch: Batch) -> Tensor | None:
        correction = self.times.correction(noised.t)
        return None if correction is None else self._fold(correction.to(noised.t.device), batch)

    def _raw(self, name: str, noised: Noised, cond, ctx) -> Tensor:
        return ctx.predict(name, noised.xt, noised.t, cond).float()

    def _error(self, noised: Noised, raw: Tensor, batch: Batch, ctx) -> Tensor:
        return self._mean_square(ctx.param.target(noised) - raw, batch)

    def _mean_square(self, x: Tensor, batch: Batch) -> Tensor:
        """Per element, reduced in float32: [draws, B, K]."""
        return self._fold(x.square().flatten(1).mean(1), batch)

    def _fold(self, rows: Tensor, batch: Batch) -> Tensor:
        return rows.view(self.draws, batch.groups, batch.k)


def implied_nats(beta: float, elements: int) -> dict[str, float]:
    """Other conventions of the same beta, for a latent of ``elements`` numbers (diffusion_dpo.md section 2).

    beta here is the reference code's: mean-reduced error, factor 1/2. kappa multiplies mean-reduced errors; eq14 is the
    paper's, sum-reduced.
    """
    return {"kappa": beta / 2, "beta_eq14": beta / (2 * elements), "beta_eq46": beta / elements}
