"""Supervised fine-tuning on winners, alone or mixed into another objective as an anchor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..types import Batch, Estimate, Loss, Memory
from .base import Objective


def winners(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The best valid candidate of each group: group [P], winner [P].

    A candidate that is alone must be liked (utility above 0); of several one must be better than another, since the first of
    a tie has won nothing.
    """
    score = batch.utility.masked_fill(~batch.valid, -torch.inf)
    best = score.max(1)
    low = batch.utility.masked_fill(~batch.valid, torch.inf).min(1).values
    alone = batch.valid.sum(1) == 1
    group = torch.where(alone, best.values > 0, best.values > low).nonzero().squeeze(1)
    return group, best.indices[group]


@dataclass(frozen=True)
class SFT:
    """The winner's mean squared denoising error (the card's ell^w), weight 1."""

    needs_scores = False
    title = "SFT on winners"
    reference_free = True
    min_k = 1

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w = winners(batch)
        return Loss.from_rows(est.error[b, w], b, batch, winner_error=est.error[b, w])


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """Another objective plus ``weight`` times the winner's error: keeps winners likely while the margin grows."""

    objective: Objective
    weight: float

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")

    @property
    def needs_scores(self) -> bool:
        return self.objective.needs_scores

    @property
    def title(self) -> str:
        return f"{self.objective.title} with SFT anchor"

    @property
    def reference_free(self) -> bool:
        return self.objective.reference_free

    @property
    def min_k(self) -> int:
        return self.objective.min_k

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        loss = self.objective(est, batch, memory)
        anchor = SFT()(est, batch, memory)
        return replace(loss, per_group=loss.per_group + self.weight * anchor.per_group,
                       metrics={**loss.metrics, **anchor.metrics})
