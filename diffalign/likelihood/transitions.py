"""The exact log-density of a sampler's Gaussian transitions, where a candidate's own step is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..process.solver import guided, stochastic_step
from ..types import Batch, Cond, Estimate
from .base import shares


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """log p(x_s | x_t, c) of each candidate's step, in nats per latent element: -1/(2 std^2) * mean (x_s - mean)^2.

    The batch's steps say which sampler drew them (``diffalign.sampling.latents.Sampler``). Candidates that came from one state
    share its pass: one for the policy and one for each other weight set serve the whole group. With guidance the density is
    that of the guided sampler, and both of its passes have a gradient. Sources: PSO (arXiv 2410.03190; pso.md 2a), D3PO, SPO
    and LPO (spo.md 2c, lpo_lrm.md 2d), whose released codes take the mean over elements too.
    """

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None, anchor: str | None = None) -> Estimate:
        """batch: B groups of K with ``steps`` -> Estimate [B, K]. ``error`` is the squared error in units of the step's
        variance.
        """
        steps = batch.steps
        if steps is None:
            raise ValueError("transitions need the step of every candidate: a batch with steps")
        against = shares(against)
        states = steps.x_t.shape[1]  # 1 where the candidates share it
        x, cond = steps.x_t.flatten(0, 1), _some(batch.cond, states).rows(states)
        empty = None if steps.unconditional is None else _some(steps.unconditional, states).rows(states)
        t, to = (level.repeat_interleave(states) for level in (steps.t, steps.s))

        def predict(name: str) -> Tensor:
            return guided(ctx, name, x, t, cond, empty, steps.guidance_scale)

        def error(raw: Tensor) -> Tensor:
            mean, std = stochastic_step(ctx, x, raw, t, to, steps.solver, steps.eta)
            apart = (steps.x_s - mean.view_as(steps.x_t)).square().flatten(2).mean(2)
            return apart / std.view(-1, states).square()

        raws = {name: predict(name) for name in dict.fromkeys((*against, *filter(None, (anchor,))))}
        references = {name: error(raws[name]) for name in against}
        reference = sum(share * references[name] for name, share in against.items()) if against else None
        raw = predict("policy")
        own = error(raw)
        distance = None if anchor is None else (raw - raws[anchor]).square().flatten(1).mean(1).view(-1, states) / 2
        return Estimate(policy=-0.5 * own, reference=None if reference is None else -0.5 * reference, error=own,
                        reference_error=reference, t=steps.t[:, None].expand_as(own),
                        anchor=None if distance is None else distance.expand_as(own))


def _some(cond: Cond, states: int) -> Cond:
    """The condition of the first candidates: those of a group that share a state share its sizes."""
    return replace(cond, extra={name: x[:, :states] for name, x in cond.extra.items()})
