"""Links: from a margin to a loss. margin: [P] nats per element, above 0 when the pair is ordered rightly; beta > 0.

Each returns [P] float32 and names the logit that it saturates in (``beta * margin``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def _probability(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} must be at least 0 and below 0.5, got {value}")


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """-log sigmoid(beta * margin): Diffusion-DPO (Wallace et al. 2023, Eq. 14).

    smoothing: conservative DPO's label noise rate epsilon: (1-eps) * loss + eps * loss of the swapped pair. Biased towards
    small margins; see ``Robust`` for the unbiased form.
    """

    smoothing: float = 0.0
    title = "Diffusion-DPO"

    def __post_init__(self):
        _probability("smoothing", self.smoothing)

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        return _soft_logistic(beta * margin, 1 - self.smoothing)


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased under labels flipped at rate ``flip``."""

    flip: float = 0.1
    title = "Robust Diffusion-DPO"

    def __post_init__(self):
        _probability("flip", self.flip)

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        z = beta * margin
        return ((1 - self.flip) * F.softplus(-z) - self.flip * F.softplus(z)) / (1 - 2 * self.flip)


@dataclass(frozen=True)
class Squared:
    """(margin - 1/(2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17)."""

    title = "Diffusion-IPO"

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        return (margin - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta * margin): SLiC (Zhao et al. 2023, arXiv 2305.10425)."""

    title = "Diffusion-SLiC"

    def __call__(self, margin: Tensor, beta: float) -> Tensor:
        return F.relu(1 - beta * margin)


def _soft_logistic(logit: Tensor, p: Tensor | float) -> Tensor:
    """Cross-entropy of sigmoid(logit) against the probability p that the pair is ordered rightly. softplus never overflows."""
    return p * F.softplus(-logit) + (1 - p) * F.softplus(logit)


Link = Logistic | Robust | Squared | Hinge
