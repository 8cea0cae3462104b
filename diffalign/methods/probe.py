"""How far a weight set has come from the base, measured on a fixed set of winners with common times and noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .. import rng
from ..objectives.sft import winners
from ..process import Shared, draw_keys
from ..types import Batch
from .base import Context

DRAWS = 4


@dataclass(frozen=True)
class Probe:
    """Mean of (error of a set - error of the base) over winners x ``draws`` stratified uniform times, mean-reduced errors.

    Positive: the set denoises winners worse than the base (timestep_aware_dpo.md 2b; its subset and draws are not published,
    these are ours). Losers are never looked at. batches: held in memory, the same at every call.
    """

    batches: Iterable[Batch]
    draws: int = DRAWS

    @torch.no_grad()
    def __call__(self, ctx: Context, name: str, base: str = "origin", device=None) -> float:
        changes = [self._changes(replace(ctx, seed=rng.integer(ctx.seed, "probe")), name, base,
                                 batch if device is None else batch.to(device)) for batch in self.batches]
        return float(torch.cat(changes).double().mean())

    def _changes(self, ctx: Context, name: str, base: str, batch: Batch):
        """One draw after another: the model sees B*K rows at once."""
        (b, w), cond = winners(batch), batch.cond.rows(batch.k)

        def change(keys):
            t = (keys[:, -1].double() + rng.uniform(ctx.seed, "time", keys)) / self.draws
            noised = Shared().draw(batch, ctx, keys, t)

            def error(weights: str):
                raw = ctx.predict(weights, noised.xt, noised.t, cond).float()
                return (ctx.param.target(noised) - raw).square().flatten(1).mean(1).view(batch.groups, batch.k)

            return (error(name) - error(base))[b, w]

        return torch.cat([change(keys) for keys in draw_keys(batch.key, self.draws).split(batch.groups)])
