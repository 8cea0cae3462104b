"""Which candidates of a group are compared. __call__(batch) -> group, winner, loser: [P] int64 each.

Invalid candidates give no pair; nor do ties, except that BestWorst keeps them when the batch brings soft labels. The number
of pairs depends on the labels, so it is asked of their copy on the CPU: a device would have to be waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Batch, carried

ROUNDING = 1e-6  # share of a group's spread


def beside(batch: Batch, *indices: Tensor) -> tuple[Tensor, ...]:
    """Indices on the batch's device, without waiting."""
    return tuple(carried(index, batch.utility.device) for index in indices)


def above_mean(batch: Batch) -> Tensor:
    """[B, K] bool: valid candidates better than their group's mean. One that lies on it, up to rounding, is not: vote shares
    of 1/5, 3/5 and 1 have a mean of 3/5 or a bit less in float32, as their order has it."""
    utility = batch.utility.double()
    mean = (utility * batch.valid).sum(1, keepdim=True) / batch.valid.sum(1, keepdim=True).clamp(min=1)
    low, high = (utility.masked_fill(~batch.valid, fill) for fill in (torch.inf, -torch.inf))
    spread = (high.amax(1, keepdim=True) - low.amin(1, keepdim=True)).clamp(min=0)
    return (utility - mean > ROUNDING * spread) & batch.valid


@dataclass(frozen=True)
class BestWorst:
    """The best against the worst valid candidate of each group; for a pair, the pair."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return beside(batch, *self._of(batch.labels))

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
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
        utility, valid = batch.labels.utility, batch.labels.valid
        above = utility[:, :, None] > utility[:, None, :]
        both = valid[:, :, None] & valid[:, None, :]
        return beside(batch, *(above & both).nonzero(as_tuple=True))


@dataclass(frozen=True, kw_only=True)
class EasyToHard:
    """Curry-DPO's curriculum (arXiv 2403.07230): the best candidate against the worst first, then against ever closer ones.

    The opponent moves up by one rank every ``stage`` groups of the run, until it is the runner-up; groups of two stay pairs.
    The paper makes the model of a stage the next one's reference: ``reference: {kind: moving, every: <steps of a stage>}``.
    """

    stage: int

    def __post_init__(self):
        if self.stage < 1:
            raise ValueError(f"stage must be at least 1 group, got {self.stage}")

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return beside(batch, *self._of(batch.labels))

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if batch.place is None:
            raise ValueError("a curriculum needs the groups' places in the run, and this batch has none")
        order = batch.utility.masked_fill(~batch.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        count = batch.valid.sum(1)
        step = (batch.place.to(count.device) // self.stage).clamp(max=batch.k)
        place = (count - 1 - step).clamp(min=1).clamp(max=max(batch.k - 1, 0))
        group = torch.arange(batch.groups, device=count.device)
        winner, loser = order[:, 0], order[group, place]
        keep = ((count >= 2) & (batch.utility[group, winner] > batch.utility[group, loser])).nonzero().squeeze(1)
        return keep, winner[keep], loser[keep]


Pairs = BestWorst | AllPairs | EasyToHard
