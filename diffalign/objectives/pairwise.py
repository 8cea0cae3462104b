"""Pairwise preference objectives: a pair rule, a labeler and a link."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory
from .base import needs_scores, title_of
from .labels import Hard, Labels
from .links import Link, Logistic
from .pairs import BestWorst, Pairs

CENTRE = "log_ratio"


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """loss = weight * link(beta, scale * log-ratio of the winner, of the loser), averaged over both orders by the label.

    With the logistic link this is Diffusion-DPO (arXiv 2311.12908, Eq. 14). beta is the reference code's: mean-reduced error
    and the factor 1/2 inside the estimate, so kappa = beta/2 (diffusion_dpo.md section 2; published 2000 to 5000).
    reference_free: compare likelihoods of the policy alone. centre: subtract the running mean of the log-ratio from both
    sides (BCO's shift; pointwise links alone see it; last step's value).
    """

    beta: float
    link: Link = Logistic()
    pairs: Pairs = BestWorst()
    labels: Labels = Hard()
    reference_free: bool = False
    centre: bool = False
    min_k = 2

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    @property
    def title(self) -> str:
        """The method's name in reports."""
        return title_of(self.link)

    @property
    def needs_scores(self) -> bool:
        return needs_scores(self.labels)

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        label = self.labels(batch, b, w, l)
        shift = memory.read(CENTRE) if self.centre else 0.0
        stretch = getattr(self.link, "stretch", 1.0)
        winner, loser = ((est.log_ratio[b, i] - shift) * label.scale for i in (w, l))
        rows = label.weight * self._both_orders(winner, loser, label.p, label.offset / (2 * self.beta * stretch))
        logit = (self.beta * stretch * (winner - loser) - label.offset).detach()
        loss = Loss.from_rows(rows, b, batch, logit=logit, saturated=(logit.abs() > 5).float(), gradient=torch.sigmoid(-logit))
        if self.centre:
            both = torch.cat([est.log_ratio[b, w], est.log_ratio[b, l]]).detach()
            loss = replace(loss, observed={CENTRE: (both.sum(), torch.tensor(float(len(both)), device=both.device))})
        return loss

    def _both_orders(self, winner: Tensor, loser: Tensor, p: Tensor, half: Tensor) -> Tensor:
        """The offset is split between the two sides, so that pointwise links see it as well."""
        right = self.link(winner - half, loser + half, self.beta)
        swapped = self.link(loser - half, winner + half, self.beta)
        return p * right + (1 - p) * swapped
