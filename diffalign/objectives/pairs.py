"""Which candidates of a group are compared. __call__(batch) -> group, winner, loser: [P] int64 each.

Invalid candidates give no pair; nor do ties, except that BestWorst keeps them when the batch brings soft labels.
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
        several, differ = batch.valid.sum(1) >= 2, best.values > worst.values
        winner, loser = best.indices, worst.indices
        if batch.soft is not None:  # a soft tie is a pair too: the first against the last, with probability one half
            first, last = batch.valid.int().argmax(1), batch.k - 1 - batch.valid.flip(1).int().argmax(1)
            winner, loser = torch.where(differ, winner, first), torch.where(differ, loser, last)
            differ = torch.ones_like(differ)
        group = (several & differ).nonzero().squeeze(1)
        return group, winner[group], loser[group]


@dataclass(frozen=True)
class AllPairs:
    """Every ordered pair of valid candidates with unlike utility."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        above = batch.utility[:, :, None] > batch.utility[:, None, :]
        both = batch.valid[:, :, None] & batch.valid[:, None, :]
        return (above & both).nonzero(as_tuple=True)


Pairs = BestWorst | AllPairs
