"""Penalties that any objective can add."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F

from ..types import Batch, Estimate, Loss, Memory
from .base import Objective, needs_scores, reads_weighting, title_of
from .sft import SFT, winners


@dataclass(frozen=True, kw_only=True)
class Regularized:
    """objective + sft * error of the winner + winner * rise of the winner's error + origin * distance from the base model.

    sft: supervised fine-tuning on winners (CPO's and iterative reasoning PO's term). winner: times max(0, error of the policy
    minus error of the reference) on winners (DPO-positive's idea, arXiv 2402.13228; beta/2 gives it the scale of the logit):
    stops a margin that grows by ruining both sides. origin: times the KL surrogate to the base model, the mean over the
    candidates of 1/2 W(t) (prediction of the policy - of the base)^2; costs a pass of the base where the reference moved.
    """

    objective: Objective
    sft: float = 0.0
    winner: float = 0.0
    origin: float = 0.0

    def __post_init__(self):
        for name in ("sft", "winner", "origin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.winner and self.objective.reference_free:
            raise ValueError("winner needs an objective with a reference: without one there is no error to rise above")

    @property
    def needs_scores(self) -> bool:
        return needs_scores(self.objective)

    @property
    def title(self) -> str:
        added = [name for name in ("sft", "winner", "origin") if getattr(self, name)]
        title = title_of(self.objective)
        return f"{title} + {', '.join(added)}" if added else title

    @property
    def beta(self) -> float | None:
        return getattr(self.objective, "beta", None)

    @property
    def reference_free(self) -> bool:
        return self.objective.reference_free

    @property
    def reads_weighting(self) -> bool:
        return self.origin > 0 or reads_weighting(self.objective)

    @property
    def beta_unit(self) -> float:
        return getattr(self.objective, "beta_unit", 1.0)

    @property
    def min_k(self) -> int:
        return self.objective.min_k

    @property
    def reads_origin(self) -> bool:
        return self.origin > 0 or getattr(self.objective, "reads_origin", False)

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        loss = self.objective(est, batch, memory)
        rows, metrics = loss.per_group, dict(loss.metrics)
        if self.sft:
            rows = rows + self.sft * SFT()(est, batch, memory).per_group
        if self.winner:
            b, w = winners(batch)
            rise = F.relu(est.error[b, w] - est.reference_error[b, w])
            rows = rows.index_add(0, b, self.winner * rise)
            metrics["winner_rise"] = rise.detach()
        if self.origin:
            distance = (est.anchor * batch.valid).sum(1) / batch.valid.sum(1).clamp(min=1)
            rows = rows + self.origin * distance
            metrics["origin_distance"] = distance.detach()
        return replace(loss, per_group=rows, metrics=metrics)
