"""What the utilities of a pair say about it: how sure the label is, how much the pair weighs, how far apart it should be.

__call__(batch, group, winner, loser) -> Label; all its fields are [P], constants without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Batch


@dataclass(frozen=True, kw_only=True)
class Label:
    """p: probability that the pair is ordered rightly; the loss is averaged over both orders. weight: multiplies the loss.
    scale: multiplies the log-ratios. offset: in units of the logit, what the margin must exceed.
    """

    p: Tensor
    weight: Tensor
    scale: Tensor
    offset: Tensor


def _label(batch: Batch, b: Tensor, like: Tensor, **given: Tensor) -> Label:
    """like: [P]. Where the data brings soft labels and the labeler has no probability of its own, theirs holds: of a soft tie
    nobody has won."""
    one = torch.ones_like(like)
    p = one if batch.soft is None else batch.soft[b]
    return Label(**{"p": p, "weight": one, "scale": one, "offset": torch.zeros_like(like), **given})


def _gap(batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Tensor:
    """[P]: utility of the winner minus that of the loser."""
    return batch.utility[b, w] - batch.utility[b, l]


@dataclass(frozen=True)
class Hard:
    """The order is the label; where the data brings soft labels, their probability."""

    needs_scores = False

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = _gap(batch, b, w, l)
        return _label(batch, b, gap)


@dataclass(frozen=True, kw_only=True)
class SoftTarget:
    """p = sigmoid(gamma * gap): MMPO (Kim et al. 2024, arXiv 2410.03145); a cross-entropy, near-ties are pulled together."""

    gamma: float = 1.0
    needs_scores = True

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = _gap(batch, b, w, l)
        return _label(batch, b, gap, p=torch.sigmoid(self.gamma * gap))


@dataclass(frozen=True, kw_only=True)
class SoftMargin:
    """SmPO (Lu et al. 2025, arXiv 2506.02698): the logit times kappa * (2p - 1), p = sigmoid(gap / temperature).

    Not a cross-entropy: at p = 1/2 the pair pushes nothing. kappa is the paper's gamma, 10. temperature: the reward's range
    (PickScore's 0.1666 in the released code). Swapping the pair and p -> 1-p changes nothing.
    """

    kappa: float = 10.0
    temperature: float = 1.0
    needs_scores = True

    def __post_init__(self):
        if self.kappa <= 0 or self.temperature <= 0:
            raise ValueError(f"kappa and temperature must be above 0, got {self.kappa} and {self.temperature}")

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = _gap(batch, b, w, l)
        return _label(batch, b, gap, p=torch.ones_like(gap), scale=self.kappa * torch.tanh(gap / (2 * self.temperature)))


@dataclass(frozen=True, kw_only=True)
class Offset:
    """A margin to exceed: a constant (SimPO's gamma, arXiv 2405.14734) plus alpha * log(gap) (ODPO, arXiv 2402.10571).

    The gap is floored, since log is minus infinity at 0; below a gap of 1 the offset is negative.
    """

    constant: float = 0.0
    alpha: float = 0.0
    floor: float = 1e-3

    def __post_init__(self):
        if self.floor <= 0:
            raise ValueError(f"floor must be above 0, got {self.floor}")

    @property
    def needs_scores(self) -> bool:
        return self.alpha != 0

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = _gap(batch, b, w, l)
        return _label(batch, b, gap, offset=self.constant + self.alpha * gap.clamp(min=self.floor).log())


@dataclass(frozen=True, kw_only=True)
class DCG:
    """RankDPO's weights (arXiv 2410.18013, Eq. 6): |2^u_i - 2^u_j| * |1/ln(1+rank_i) - 1/ln(1+rank_j)|, of the true ranks.

    Utilities should lie in [0, 1] (win shares). Equal utilities take their average rank; their own pair weighs nothing.
    """

    needs_scores = True

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        utility, valid = batch.utility, batch.valid
        both = valid[:, None, :] & valid[:, :, None]
        above = ((utility[:, None, :] > utility[:, :, None]) & both).sum(2)
        level = ((utility[:, None, :] == utility[:, :, None]) & both).sum(2)
        discount = 1 / torch.log1p((1 + above).to(utility.dtype) + (level - 1) / 2)
        gain = torch.exp2(utility)
        weight = (gain[b, w] - gain[b, l]).abs() * (discount[b, w] - discount[b, l]).abs()
        return _label(batch, b, weight, weight=weight)


@dataclass(frozen=True, kw_only=True)
class GapWeight:
    """weight = min(most, gap^power): a negative power stresses near-ties, a positive one clear pairs.

    After MaDPO (arXiv 2510.05342), whose weight function was not to be had: this one is ours. A tie weighs nothing.
    """

    power: float = 1.0
    most: float = 10.0
    needs_scores = True

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = _gap(batch, b, w, l)
        weight = gap.clamp(min=1e-6).pow(self.power).clamp(max=self.most)
        return _label(batch, b, gap, weight=torch.where(gap > 0, weight, 0.0))


Labels = Hard | SoftTarget | SoftMargin | Offset | DCG | GapWeight
