"""Estimator, then objective: every offline preference method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..likelihood import Likelihood
from ..objectives import Objective
from ..types import Batch, Loss
from .base import Context
from .health import health

REFERENCE, ORIGIN = "reference", "origin"


@dataclass(frozen=True)
class Preference:
    """loss = objective(estimate(batch)), with the health metrics that every method gets.

    references: weight sets and their shares that an objective with a reference is measured against. ``origin``: the model
    that training started from, which is the reference itself while that one does not move.
    """

    estimator: Likelihood
    objective: Objective
    references: Mapping[str, float] = field(default_factory=lambda: {REFERENCE: 1.0})
    origin: str = REFERENCE

    @classmethod
    def of(cls, estimator: Likelihood, objective: Objective, reference) -> Preference:
        """reference: the rule that says which sets stand for it (``diffalign.models.references``)."""
        return cls(estimator, objective, reference.names, origin=ORIGIN if reference.moves else REFERENCE)

    @property
    def against(self) -> Mapping[str, float]:
        return {} if self.objective.reference_free else self.references

    @property
    def anchor(self) -> str | None:
        return self.origin if getattr(self.objective, "reads_origin", False) else None

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("policy", *self.against, *filter(None, (self.anchor,)))))

    def loss(self, batch: Batch, ctx: Context) -> Loss:
        est = self.estimator(batch, ctx, self.against, self.anchor)
        loss = self.objective(est, batch, ctx.memory)
        rows = loss.per_group if est.importance is None else loss.per_group * est.importance
        return replace(loss, per_group=rows, metrics={**health(est, batch), **loss.metrics})
