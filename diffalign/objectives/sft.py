"""Supervised fine-tuning on winners."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..types import Batch, Estimate, Loss, Memory
from .pairs import beside


def winners(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The best valid candidate of each group: group [P], winner [P].

    A candidate that is alone must be liked (utility above 0); of several one must be better than another, since the first of
    a tie has won nothing.
    """
    utility, valid = batch.labels.utility, batch.labels.valid
    best = utility.masked_fill(~valid, -torch.inf).max(1)
    low = utility.masked_fill(~valid, torch.inf).min(1).values
    alone = valid.sum(1) == 1
    group = torch.where(alone, best.values > 0, best.values > low).nonzero().squeeze(1)
    return beside(batch, group, best.indices[group])


@dataclass(frozen=True)
class SFT:
    """The winner's mean squared denoising error (the card's ell^w), weight 1."""

    needs_scores = False
    reads_weighting = False
    title = "SFT on winners"
    reference_free = True
    min_k = 1

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w = winners(batch)
        return Loss.from_rows(est.error[b, w], b, batch, winner_error=est.error[b, w])
