"""Which candidates of a group are compared. __call__(batch) -> group, winner, loser: [P] int64 each.

Ties and invalid candidates give no pair, unless the batch brings soft labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Batch


@dataclass(frozen=True)
class BestWorst:
    """The best against the worst valid candidate of each group; for a pair, the pair."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        best = batch.utility.masked_fill(~batch.valid, -torch.inf).max(1)
        worst = batch.utility.masked_fill(~batch.valid, torch.inf).min(1)
        keep = (best.values > worst.values) & (batch.valid.sum(1) >= 2)
        if batch.soft is not None:  # a soft tie is a pair too: 0 against 1, with probability one half
            tie = (batch.valid.sum(1) >= 2) & ~keep
            first, last = torch.zeros_like(best.indices), torch.full_like(worst.indices, batch.k - 1)
            best_i, worst_i = torch.where(tie, first, best.indices), torch.where(tie, last, worst.indices)
            keep = keep | tie
        else:
            best_i, worst_i = best.indices, worst.indices
        group = keep.nonzero().squeeze(1)
        return group, best_i[group], worst_i[group]


@dataclass(frozen=True)
class AllPairs:
    """Every ordered pair of valid candidates with unlike utility."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        above = batch.utility[:, :, None] > batch.utility[:, None, :]
        both = batch.valid[:, :, None] & batch.valid[:, None, :]
        return (above & both).nonzero(as_tuple=True)


Pairs = BestWorst | AllPairs
