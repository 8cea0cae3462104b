"""ORPO on denoising errors (Hong et al. 2024, arXiv 2403.07691, carried over to diffusion)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory
from .mapo import expected
from .pairs import BestWorst, Pairs


def log_odds(error: Tensor) -> Tensor:
    """log[p / (1 - p)] with p = exp(-error) read as a likelihood: -error - log(1 - exp(-error)), error floored at 1e-6."""
    error = error.clamp(min=1e-6)
    return -error - torch.log(-torch.expm1(-error))


@dataclass(frozen=True, kw_only=True)
class ORPO:
    """error of the winner - weight * log sigmoid(log-odds of the winner - of the loser).

    exp(-error) is no probability; the errors are mean-reduced, so the log-odds stay of order one. MaPO, which bounds the odds
    and scales the margin, is the published answer for diffusion; this is here to compare with.
    """

    weight: float = 0.1
    pairs: Pairs = BestWorst()
    reference_free = True
    min_k = 2
    title = "Diffusion-ORPO"
    needs_scores = False
    reads_weighting = False

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        e_w, e_l = est.error[b, w], est.error[b, l]
        rows = expected(lambda w, l: w + self.weight * F.softplus(log_odds(l) - log_odds(w)), e_w, e_l,
                        None if batch.soft is None else batch.soft[b])
        return Loss.from_rows(rows, b, batch, logit=log_odds(e_w) - log_odds(e_l), winner_error=e_w)
