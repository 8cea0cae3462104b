"""Heads that turn CLIP features into a score, and the losses they learn from preferences with.

A head is a frozen dataclass, its options, that makes a module: forward(image [N, D], text [N, D], user [N, K] or None) -> [N].
Every score is in log odds: sigmoid(score(a) - score(b)) is the probability that a is preferred to b (Bradley-Terry).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SCALE = 4.605170185988092  # ln 100: CLIP clamps exp(logit_scale) at 100


class Head(Protocol):
    """users: names in the order of a pluralistic head's rows; others are given none. scale: the backbone's ln(logit scale)."""

    def make(self, width: int, scale: float, users: Sequence[str] = ()) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """exp(s) cos(image, text) + MLP([image, text, image * text]); one taste for everybody.

    Starts as the backbone's own score: the MLP's last layer is zero. hidden: width of its one hidden layer; 0 leaves the MLP
    out, which with LoRA features is PickScore (arXiv 2305.01569). loss: "logistic"; a tie has its least loss at equal scores.
    init_seed: of the MLP's first layer; rewards to be averaged (WARM) must share it.
    """

    hidden: int = 256
    init_seed: int = 0
    pluralistic = False

    def __post_init__(self):
        if self.hidden < 0:
            raise ValueError(f"hidden must be at least 0, got {self.hidden}")

    def make(self, width: int, scale: float, users: Sequence[str] = ()) -> nn.Module:
        return PairHead(width, self.hidden, scale)


class PairHead(nn.Module):
    """See ``BradleyTerry``."""

    def __init__(self, width: int, hidden: int, scale: float):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        self.mlp = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, 1)) if hidden else None
        if self.mlp is not None:
            nn.init.zeros_(self.mlp[-1].weight)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        product = image * text
        score = self.logit_scale.clamp(max=LARGEST_SCALE).exp() * product.sum(-1)
        # unit features have entries of about 1 / sqrt(D); the MLP sees numbers around 1, and the product of two such
        root = image.shape[-1] ** 0.5
        return score if self.mlp is None else score + self.mlp(torch.cat([image, text, product * root], -1) * root)[:, 0]


def logistic(margin: Tensor, target: Tensor) -> Tensor:
    """KL(target || sigmoid(margin)) in nats, [P]: -log sigmoid(margin) for target 1, 0 where the prediction is the target.

    margin: score of the first minus of the second picture; target: probability that the first is preferred. The tie of 0.5
    loses its constant ln 2, as in PickScore: an equal pair scored equal costs nothing.
    """
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    return F.binary_cross_entropy_with_logits(margin, target, reduction="none") - entropy


def hinge(margin: Tensor, target: Tensor) -> Tensor:
    """max(0, 1 - margin) for target 1, its mirror for 0, their mean in proportion between; [P]."""
    return target * F.relu(1 - margin) + (1 - target) * F.relu(1 + margin)


LOSSES = {"logistic": logistic, "hinge": hinge}
