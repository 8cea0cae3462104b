"""Estimator, then objective: every offline preference method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..likelihood import DenoisingELBO
from ..objectives import Objective
from ..types import Batch, Loss
from .base import Context
from .health import health


@dataclass(frozen=True)
class Preference:
    """loss = objective(estimate(batch)), with the health metrics that every method gets."""

    estimator: DenoisingELBO
    objective: Objective

    @property
    def reads(self) -> tuple[str, ...]:
        return ("policy",) if self.objective.reference_free else ("policy", "reference")

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        est = self.estimator(batch, ctx, against=None if self.objective.reference_free else "reference")
        loss = self.objective(est, batch, ctx.memory)
        return replace(loss, metrics={**health(est, batch), **loss.metrics})
