"""PAL: one reward for many tastes (Chen et al. 2024, arXiv 2406.08469; ICLR 2025). A user is a mixture of K prototypes.

A picture x and a prompt c lie in a preference space; a user's ideal point is mixed there from K prototypes with the user's
softmax weights w_u, and what lies nearer to it is preferred. Ideal points are mixed, not rewards: sum_k w_k r_k is another
model. A new user costs K numbers, fitted on a few pairs with everything else frozen. Prototypes can change places between two
runs, so weights of two runs must not be compared.

The public code has its distance loss upside down; here a score is always higher for what is preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import LARGEST_SCALE, LOSSES

START_SCALE = 2.659260  # ln(1 / 0.07), where CLIP's own temperature starts
SHOT_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class _Pal:
    """prototypes: K tastes; 1 is an ordinary reward. dimension, hidden: of the preference space and of the MLPs into it.

    init_seed: of all starting weights. user_learning_rate: of the users' weights and the prototypes; the MLPs take the
    recipe's. loss: on the difference of two scores.
    """

    prototypes: int = 2
    dimension: int = 64
    hidden: int = 256
    init_seed: int = 0
    user_learning_rate: float = 5e-3
    pluralistic = True

    def __post_init__(self):
        for name in ("prototypes", "dimension", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.user_learning_rate <= 0:
            raise ValueError(f"user_learning_rate must be above 0, got {self.user_learning_rate}")


@dataclass(frozen=True, kw_only=True)
class PalDistance(_Pal):
    """PAL-A: r_u(x) = -|f(x) - f(P w_u)|; the prompt is not read, so it is for tastes and not for how well a prompt is met.

    P: K prototypes in feature space. bound: distances from the origin beyond it are penalised, for prototypes' images in
    preference space; 0 switches that off.
    """

    loss: Literal["logistic", "hinge"] = "logistic"
    bound: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if self.bound < 0:
            raise ValueError(f"bound must be at least 0, got {self.bound}")

    def make(self, width: int, scale: float, users: Sequence[str] = ()) -> nn.Module:
        return DistanceHead(self, width, len(users))


@dataclass(frozen=True, kw_only=True)
class PalAngle(_Pal):
    """PAL-B: r_u(x | c) = exp(s) cos(f(x), sum_k w_uk g_k(c)); the ideal point depends on the prompt. The one for pictures."""

    loss: Literal["logistic", "hinge"] = "logistic"

    def make(self, width: int, scale: float, users: Sequence[str] = ()) -> nn.Module:
        return AngleHead(self, width, len(users))


class _PalHead(nn.Module):
    """Users' logits [U, K]; ``users`` may have no row, then everyone is the even mixture."""

    def __init__(self, options: _Pal, width: int, users: int):
        super().__init__()
        self.user_logits = nn.Parameter(torch.randn(users, options.prototypes))
        self.items = mlp(width, options.hidden, options.dimension)

    @property
    def prototypes(self) -> int:
        return self.user_logits.shape[1]

    def user_weights(self, rows: Tensor) -> Tensor:
        """rows [N] int64, -1 for a user not seen in training -> weights [N, K] on the simplex."""
        if not len(self.user_logits):
            return self.population().expand(len(rows), -1)
        return torch.where(rows[:, None] >= 0, self.user_logits[rows.clamp(min=0)].softmax(-1), self.population())

    def population(self) -> Tensor:
        """The mean of all users' weights, [K]."""
        if not len(self.user_logits):
            return self.user_logits.new_full((self.prototypes,), 1 / self.prototypes)
        return self.user_logits.softmax(-1).mean(0)

    def penalty(self) -> Tensor:
        return self.user_logits.new_zeros(())


class DistanceHead(_PalHead):
    """See ``PalDistance``."""

    def __init__(self, options: PalDistance, width: int, users: int):
        super().__init__(options, width, users)
        self.bound = options.bound
        self.points = nn.Parameter(F.normalize(torch.randn(options.prototypes, width), dim=-1))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        return distance_score(self.items(image), self.items(mixture(self._weights(image, user), self.points)))

    def _weights(self, image: Tensor, user: Tensor | None) -> Tensor:
        return self.population().expand(len(image), -1) if user is None else user

    def penalty(self) -> Tensor:
        """sum over prototypes of max(|f(p)| - bound, 0): without it the space can grow instead of telling tastes apart."""
        if not self.bound:
            return super().penalty()
        return F.relu(self.items(self.points).norm(dim=-1) - self.bound).sum()


class AngleHead(_PalHead):
    """See ``PalAngle``."""

    def __init__(self, options: PalAngle, width: int, users: int):
        super().__init__(options, width, users)
        self.tastes = nn.ModuleList(mlp(width, options.hidden, options.dimension) for _ in range(options.prototypes))
        self.logit_scale = nn.Parameter(torch.tensor(START_SCALE))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        weights = self.population().expand(len(image), -1) if user is None else user
        points = torch.stack([taste(text) for taste in self.tastes], 1)  # [N, K, dimension]
        return angle_score(self.items(image), mixture(weights, points), self.logit_scale)


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers with GELU between."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def mixture(weights: Tensor, points: Tensor) -> Tensor:
    """weights [N, K]; points [K, d], the same for all, or [N, K, d] -> ideal points [N, d]."""
    return weights @ points if points.ndim == 2 else (weights[:, :, None] * points).sum(1)


def distance_score(items: Tensor, ideal: Tensor) -> Tensor:
    """-|item - ideal|, [N]: the nearer is preferred. The gradient at distance 0 is 0."""
    return -(items - ideal).norm(dim=-1)


def angle_score(items: Tensor, ideal: Tensor, logit_scale: Tensor) -> Tensor:
    """exp(logit_scale), at most 100, times the cosine: [N]."""
    return logit_scale.clamp(max=LARGEST_SCALE).exp() * F.cosine_similarity(items, ideal, dim=-1)


def fit_user(head: _PalHead, first: Tensor, second: Tensor, text: Tensor, target: Tensor, *, loss: str = "logistic",
             learning_rate: float = 0.1, decay: float = 1e-3) -> Tensor:
    """Weights [K] of a new user from P pairs: features first, second, text [P, D], target [P] = P(first is preferred).

    Only K new logits move; they start at 0, the even mixture, and a small decay keeps them finite where one taste explains
    every pair. Deterministic. With one prototype there is nothing to fit.
    """
    logits = torch.zeros(head.prototypes, device=first.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    for _ in range(SHOT_STEPS):
        weights = logits.softmax(-1).expand(len(first), -1)
        margin = head(first, text, weights) - head(second, text, weights)
        total = LOSSES[loss](margin, target).mean() + decay * logits.square().sum()
        (logits.grad,) = torch.autograd.grad(total, [logits])
        optimizer.step()
    return logits.detach().softmax(-1)
