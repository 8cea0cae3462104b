"""The exact log-density of a sampler's Gaussian transitions, where a candidate's own path is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..process.solver import stochastic_step
from ..types import Batch, Estimate


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """log p(x_{n+1} | x_n, c) of every stochastic step of a sample, in nats per latent element.

    -1/(2 std^2) * mean (x_{n+1} - mean)^2; the last step, from the lowest level to the image, has no density and is left out.
    solver, timesteps: the sampler's (see ``diffalign.sampling.latents.Sampler``). Source: PSO (arXiv 2410.03190; pso.md 2a);
    with the 20 levels of an ancestral sampler it is D3PO's estimator.
    """

    solver: Literal["lcm", "ancestral"] = "lcm"
    timesteps: tuple[int, ...] = (999, 749, 499, 249)

    def __post_init__(self):
        if len(self.timesteps) < 2 or any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:])):
            raise ValueError(f"timesteps must be two or more and fall, got {list(self.timesteps)}")

    @property
    def steps(self) -> int:
        """Transitions with a density."""
        return len(self.timesteps) - 1

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None, anchor: str | None = None
                 ) -> tuple[Estimate, Batch]:
        """batch: B groups of K with ``states`` [B, K, levels, *S] -> Estimate [steps*B, K], a group for each step, and the
        batch repeated to match, steps outermost. ``error`` is the squared error in units of the step's variance."""
        if batch.states is None or batch.states.shape[2] != len(self.timesteps):
            raise ValueError("transitions need the path of every candidate, with a latent for each of the timesteps")
        against = {against: 1.0} if isinstance(against, str) else dict(against or {})
        wide = repeat(batch, self.steps)
        x, after = (batch.states[:, :, part].movedim(2, 0).flatten(0, 2) for part in (slice(0, -1), slice(1, None)))
        levels = ctx.process.snap((torch.tensor(self.timesteps, dtype=torch.float64, device=x.device) + 1) / 1000)
        t, to = (part.repeat_interleave(batch.groups * batch.k) for part in (levels[:-1], levels[1:]))
        cond = batch.cond.rows(batch.k, self.steps)

        def error(raw: Tensor) -> Tensor:
            mean, std = stochastic_step(ctx, x, raw, t, to, self.solver)
            return ((after - mean).square().flatten(1).mean(1) / std**2).view(wide.groups, batch.k)

        raws = {name: ctx.predict(name, x, t, cond).float() for name in dict.fromkeys((*against, *filter(None, (anchor,))))}
        references = {name: error(raws[name]) for name in against}
        reference = sum(share * references[name] for name, share in against.items()) if against else None
        raw = ctx.predict("policy", x, t, cond).float()
        own = error(raw)
        distance = None if anchor is None else (raw - raws[anchor]).square().flatten(1).mean(1).view(own.shape) / 2
        return Estimate(policy=-0.5 * own, reference=None if reference is None else -0.5 * reference, error=own,
                        reference_error=reference, t=t.view(own.shape), anchor=distance), wide


def repeat(batch: Batch, times: int) -> Batch:
    """The batch's groups ``times`` times over, without their states."""
    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat(times, *[1] * (x.dim() - 1))

    cond = replace(batch.cond, tokens=again(batch.cond.tokens), pooled=again(batch.cond.pooled),
                   extra={name: again(x) for name, x in batch.cond.extra.items()})
    return replace(batch, x0=again(batch.x0), cond=cond, utility=again(batch.utility), valid=again(batch.valid),
                   key=again(batch.key), soft=again(batch.soft), place=again(batch.place), states=None)
