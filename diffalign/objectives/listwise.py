"""Objectives of a whole ranking: one log-ratio per candidate, scores ``s = beta * log-ratio``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory
from .pairs import above_mean


def _scores(est: Estimate, batch: Batch, beta: float) -> Tensor:
    """[B, K], minus infinity for invalid candidates."""
    return (beta * est.log_ratio).masked_fill(~batch.valid, -torch.inf)


def _logits(scores: Tensor) -> dict[str, Tensor]:
    finite = torch.where(scores.isfinite(), scores, torch.nan).detach()
    return {"logit": finite, "saturated": torch.where(finite.isnan(), torch.nan, (finite.abs() > 5).float())}


@dataclass(frozen=True, kw_only=True)
class PlackettLuce:
    """-sum_k [s_k - logsumexp_{i >= k} s_i] over the order of the utilities. With K = 2 it is the logistic DPO loss.

    Equal utilities have no order among them: a tied candidate is only compared with those strictly below it, and with itself.
    """

    beta: float
    reference_free: bool = False
    min_k = 2
    title = "Plackett-Luce DPO"
    needs_scores = False

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        scores, utility = _scores(est, batch, self.beta), batch.utility
        own = torch.eye(batch.k, dtype=torch.bool, device=utility.device)
        field = ((utility[:, None, :] < utility[:, :, None]) | own) & batch.valid[:, None, :]  # [B, k, i]: i still in the race
        rest = torch.where(field, scores[:, None, :], -torch.inf).logsumexp(2)
        keep = batch.valid & (field.sum(2) > 1)
        return Loss(per_group=torch.where(keep, rest - scores, 0.0).sum(1), metrics=_logits(scores))


@dataclass(frozen=True, kw_only=True)
class SetContrast:
    """Multi-preference (set-level) contrast (arXiv 2412.04628): -log [sum_{Y+} w e^s / sum_all w e^s].

    Y+ are the candidates above the group's mean utility; w = exp(alpha |utility - mean|), alpha 0 by default: the sign for
    negatives is not published. One positive and one negative with alpha 0 is the logistic DPO loss.
    """

    beta: float
    alpha: float = 0.0
    reference_free: bool = False
    min_k = 2
    title = "Multi-preference DPO"
    needs_scores = True

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        count = batch.valid.sum(1, keepdim=True).clamp(min=1)
        mean = (batch.utility * batch.valid).sum(1, keepdim=True) / count
        scores = _scores(est, batch, self.beta) + self.alpha * (batch.utility - mean).abs()
        positive = above_mean(batch)
        keep = positive.any(1)
        everything = torch.where(keep[:, None], scores, 0.0).logsumexp(1)
        chosen = torch.where(positive | ~keep[:, None], torch.where(keep[:, None], scores, 0.0), -torch.inf).logsumexp(1)
        return Loss(per_group=everything - chosen, metrics=_logits(scores))
