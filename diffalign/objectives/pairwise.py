"""Pairwise preference objectives: Diffusion-DPO and its links."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..types import Batch, Estimate, Loss, Memory
from .links import Link, Logistic, _soft_logistic
from .pairs import BestWorst, Pairs


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """loss = link(beta, log-ratio of the winner - log-ratio of the loser).

    With the logistic link this is Diffusion-DPO (arXiv 2311.12908, Eq. 14). beta is the reference code's: mean-reduced error
    and the factor 1/2 inside the estimate, so kappa = beta/2 (diffusion_dpo.md section 2; published 2000 to 5000).
    reference_free: compare likelihoods of the policy alone. Soft labels (``batch.soft``) need the logistic link.
    """

    beta: float
    link: Link = Logistic()
    pairs: Pairs = BestWorst()
    reference_free: bool = False
    min_k = 2

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    @property
    def title(self) -> str:
        """The method's name in reports."""
        return self.link.title

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        ratio = est.log_ratio
        margin = ratio[b, w] - ratio[b, l]
        logit = (self.beta * margin).detach()
        return Loss.from_rows(self._rows(margin, b, batch), b, batch, logit=logit,
                              saturated=(logit.abs() > 5).float(), gradient=torch.sigmoid(-logit))

    def _rows(self, margin, b, batch: Batch):
        if batch.soft is None:
            return self.link(margin, self.beta)
        if not isinstance(self.link, Logistic):
            raise ValueError("soft labels need the logistic link")
        return _soft_logistic(self.beta * margin, (1 - 2 * self.link.smoothing) * batch.soft[b] + self.link.smoothing)

