"""Diffusion-KTO: unpaired likes and dislikes (Li et al. 2024, arXiv 2404.04465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory

BASELINE = "kto_gain"


def _liked(batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, K] bool each: who is liked, and of whom the data says anything."""
    count = batch.valid.sum(1, keepdim=True)
    mean = (batch.utility * batch.valid).sum(1, keepdim=True) / count.clamp(min=1)
    liked = batch.utility > torch.where(count > 1, mean, 0.0)
    low, high = (batch.utility.masked_fill(~batch.valid, fill) for fill in (torch.inf, -torch.inf))
    # not "unlike the mean": that of three times 0.11 is not 0.11
    differ = (count == 1) | (low.amin(1, keepdim=True) < high.amax(1, keepdim=True))
    return liked, batch.valid & differ


@dataclass(frozen=True, kw_only=True)
class KTO:
    """w * (1 - U(y * beta * (g - z))), g = error of the reference minus error of the policy, y = +1 liked, -1 not liked.

    beta is the card's: on mean-reduced errors without the factor 1/2, so a KTO beta acts per sample like a DPO beta of twice
    its size (paper 5000; the released script runs 1000). z = max(0, running mean of g): the paper's reference point; here the
    running mean over earlier steps (a lag of one step), where the released code takes the mean of the same batch, itself
    included. utility: sigmoid (the paper's), loss_averse log sigmoid, risk_seeking softplus (loss unbounded below).
    A candidate that is alone is liked when its utility is above 0; one of several when it is above its group's mean, so that a
    pair is a like and a dislike. A group of equals says nothing.
    """

    beta: float = 5000.0
    desirable: float = 1.0
    undesirable: float = 1.0
    utility: Literal["sigmoid", "loss_averse", "risk_seeking"] = "sigmoid"
    baseline: bool = True
    reference_free = False
    min_k = 1
    title = "Diffusion-KTO"
    needs_scores = False
    beta_unit = 2.0

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if self.desirable < 0 or self.undesirable < 0:
            raise ValueError(f"desirable and undesirable must be at least 0, got {self.desirable} and {self.undesirable}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        gain = 2 * est.log_ratio  # our log-ratio carries the factor 1/2 and the weighting
        z = max(0.0, memory.read(BASELINE)) if self.baseline else 0.0
        liked, valid = _liked(batch)
        sign = torch.where(liked, 1.0, -1.0).to(gain.dtype)
        weight = torch.where(liked, self.desirable, self.undesirable).to(gain.dtype) * valid
        s = sign * self.beta * (gain - z)
        count = valid.sum(1).clamp(min=1)
        logit = s.detach()
        figures = {"logit": logit, "saturated": logit.abs() > 5, "accuracy": logit > 0}
        return Loss(per_group=(weight * (1 - self._utility(s))).sum(1) / count,
                    metrics={name: torch.where(valid, value.float(), torch.nan) for name, value in figures.items()},
                    observed={BASELINE: (torch.where(valid, gain.detach(), 0.0).sum(), valid.sum())})

    def _utility(self, s: Tensor) -> Tensor:
        if self.utility == "sigmoid":
            return torch.sigmoid(s)
        return F.logsigmoid(s) if self.utility == "loss_averse" else F.softplus(s)
