"""A link, an objective, a label and three rewards of a third party; recipes know them by the names in pyproject.toml."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.objectives import BestWorst, Label, Link, Logistic, Pairs
from diffalign.rewards.base import pixels, score_each
from diffalign.types import Batch, Estimate, Loss, Memory


@dataclass(frozen=True, kw_only=True)
class AlphaPO:
    """-log sigmoid(beta (r_w - r_l) - gamma), r = (1 - exp(-alpha c)) / alpha (arXiv 2501.03884); alpha -> 0 is SimPO."""

    alpha: float = 0.25
    gamma: float = 0.0

    def __post_init__(self):
        if self.alpha == 0:
            raise ValueError("alpha must differ from 0, where the link is logistic")

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        winner, loser = (-torch.expm1(-self.alpha * side) / self.alpha for side in (winner, loser))
        return F.softplus(self.gamma - beta * (winner - loser))


@dataclass(frozen=True, kw_only=True)
class Focal:
    """The link's loss times (1 - sigmoid(logit))^power, a constant: pairs that are learnt already count less."""

    beta: float
    power: float = 2.0
    link: Link = Logistic()
    pairs: Pairs = BestWorst()
    reference_free = False
    min_k = 2

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        winner, loser = est.log_ratio[b, w], est.log_ratio[b, l]
        logit = (self.beta * (winner - loser)).detach()
        rows = torch.sigmoid(-logit) ** self.power * self.link(winner, loser, self.beta)
        return Loss.from_rows(rows, b, batch, logit=logit)


@dataclass(frozen=True, kw_only=True)
class ClearPairs:
    """Pairs whose utilities are closer than ``least`` weigh nothing."""

    least: float = 0.1
    needs_scores = True

    def __call__(self, batch: Batch, b: Tensor, w: Tensor, l: Tensor) -> Label:
        gap = batch.utility[b, w] - batch.utility[b, l]
        one = torch.ones_like(gap)
        return Label(p=one, weight=(gap >= self.least).to(gap.dtype), scale=one, offset=torch.zeros_like(gap))


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Variance of the luma's Laplacian, on a 0..1 scale: flat 0, more edges more."""

    name = "sharpness"
    differentiable = True

    def __call__(self, images, prompts) -> Tensor:
        return score_each(self._one, images, prompts)

    def _one(self, image) -> Tensor:
        luma = pixels(image).mean(0)[None, None]
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
        return F.conv2d(luma, kernel).var(correction=0)


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """Minus the mean absolute difference between a picture and its mirror image: 0 is symmetric. axis: "x" or "y"."""

    axis: str = "x"
    name = "symmetry"
    differentiable = True

    def __post_init__(self):
        if self.axis not in ("x", "y"):
            raise ValueError(f"axis must be x or y, got {self.axis!r}")

    def __call__(self, images, prompts) -> Tensor:
        return score_each(self._one, images, prompts)

    def _one(self, image) -> Tensor:
        picture = pixels(image)
        return -(picture - picture.flip(2 if self.axis == "x" else 1)).abs().mean()


@dataclass(frozen=True, kw_only=True)
class House:
    """Minus the distance of the mean colour from the one in the row's column ``house_colour``, [r, g, b] of 0 to 255; NaN
    where a row names none.
    """

    name = "house"
    differentiable = False
    columns = ("house_colour",)

    def __call__(self, images, prompts, house_colour) -> Tensor:
        return score_each(self._one, list(zip(images, house_colour, strict=True)), prompts)

    def _one(self, row) -> Tensor:
        image, colour = row
        wanted = torch.tensor(colour or [torch.nan] * 3).float() / 255
        return -(pixels(image).mean((1, 2)) - wanted).norm()
