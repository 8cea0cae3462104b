"""The ELBO-based log-likelihood estimate of a Gaussian diffusion model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..process import NoisePlan, Shared, Times, Uniform
from ..types import Batch, Estimate, Noised
from .weighting import Simple, Weighting


@dataclass(frozen=True, kw_only=True)
class DenoisingELBO:
    """log p(x0 | c) up to a constant, as ``-1/2 * W(t) * mean squared error``, in nats per latent element.

    With the 'elbo' weighting (normalise=False, max=None) and times uniform in (0, 1), independent of ``draws``, the difference
    of two estimates is an unbiased estimate of the difference of two likelihood bounds divided by the number of elements
    (notation.md section 4). The density of other times is not divided out: it is an implicit weight on top.
    ``draws`` times and noises are averaged inside the estimate, hence inside the link. The reference, when one is read,
    sees the very same noise and goes first, without gradients.
    """

    noise: NoisePlan = Shared()
    times: Times = Uniform()
    weighting: Weighting = Simple()
    draws: int = 1

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    def __call__(self, batch: Batch, ctx, against: str | None) -> Estimate:
        """batch: B groups of K; against: name of the reference weight set, or None -> Estimate, all [B, K]."""
        noised = self.noise.draw(batch, ctx.process, self.times, ctx.seed, self.draws)
        cond = batch.cond.rows(batch.k, self.draws)
        weight = self.weighting(noised, ctx.param, ctx.process)
        reference = None if against is None else self._errors(against, noised, cond, batch, ctx)
        error = self._errors("policy", noised, cond, batch, ctx)
        weight = self._fold(weight, batch)
        return Estimate(
            policy=(-0.5 * weight * error).mean(0), error=error.mean(0), t=self._fold(noised.t, batch).mean(0),
            reference=None if reference is None else (-0.5 * weight * reference).mean(0),
            reference_error=None if reference is None else reference.mean(0))

    def _errors(self, name: str, noised: Noised, cond, batch: Batch, ctx) -> Tensor:
        """Mean squared error per element under a weight set, reduced in float32: [draws, B, K]."""
        raw = ctx.predict(name, noised.xt, noised.t, cond)
        return self._fold((ctx.param.target(noised) - raw.float()).square().flatten(1).mean(1), batch)

    def _fold(self, rows: Tensor, batch: Batch) -> Tensor:
        return rows.view(self.draws, batch.groups, batch.k)


def implied_nats(beta: float, elements: int) -> dict[str, float]:
    """Other conventions of the same beta, for a latent of ``elements`` numbers (diffusion_dpo.md section 2).

    beta here is the reference code's: mean-reduced error, factor 1/2. kappa multiplies mean-reduced errors; eq14 is the
    paper's, sum-reduced.
    """
    return {"kappa": beta / 2, "beta_eq14": beta / (2 * elements), "beta_eq46": beta / elements}

