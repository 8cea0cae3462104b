"""Links: from a pair's log-ratios to a loss. winner, loser: [P] log-ratios c, nats per element; beta > 0. Each returns [P].

Most see the margin ``h = beta * (winner - loser)`` alone; pointwise ones look at each side. Without a reference the ratios
are the policy's own log-likelihood surrogates. Source of all formulas: lm_objectives.md, which cites the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def _probability(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"{name} must be at least 0 and below 0.5, got {value}")


def soft_logistic(logit: Tensor, p: Tensor | float) -> Tensor:
    """Cross-entropy of sigmoid(logit) against the probability p that the pair is ordered rightly. softplus never overflows."""
    return p * F.softplus(-logit) + (1 - p) * F.softplus(logit)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued linearly above 40: its product with beta must stay inside float32."""
    return torch.expm1(x.clamp(max=40)) + math.exp(40.0) * F.relu(x - 40)


# --- of the margin alone --------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Logistic:
    """-log sigmoid(h): Diffusion-DPO (Wallace et al. 2023, Eq. 14).

    smoothing: conservative DPO's label noise rate epsilon: (1-eps) * loss + eps * loss of the swapped pair. Biased towards
    small margins; see ``Robust`` for the unbiased form.
    """

    smoothing: float = 0.0
    title = "Diffusion-DPO"

    def __post_init__(self):
        _probability("smoothing", self.smoothing)

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return soft_logistic(beta * (winner - loser), 1 - self.smoothing)


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased at a label flip rate ``flip``. Can be below 0."""

    flip: float = 0.1
    title = "Robust Diffusion-DPO"

    def __post_init__(self):
        _probability("flip", self.flip)

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        h = beta * (winner - loser)
        return ((1 - self.flip) * F.softplus(-h) - self.flip * F.softplus(h)) / (1 - 2 * self.flip)


@dataclass(frozen=True, kw_only=True)
class Squared:
    """(margin - 1/(2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    scaled: times beta^2, (h - 1/2)^2: the same minimum. At image betas the paper's form has gradients of 1e-4 and less of the
    error's, where AdamW's epsilon swallows them.
    """

    scaled: bool = False
    title = "Diffusion-IPO"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        loss = (winner - loser - 1 / (2 * beta)) ** 2
        return loss * beta**2 if self.scaled else loss


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - h): SLiC/RSO (arXiv 2305.10425, 2309.06657). Reference-free with beta = 1/gamma it is RePO / gamma."""

    title = "Diffusion-SLiC"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return F.relu(1 - beta * (winner - loser))


@dataclass(frozen=True, kw_only=True)
class EXO:
    """Reverse KL to the smoothed label (Ji et al. 2024, arXiv 2402.00856), pair form. epsilon > 0 is needed."""

    epsilon: float = 1e-3
    title = "Diffusion-EXO"

    def __post_init__(self):
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must be above 0 and below 0.5, got {self.epsilon}")

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        h = beta * (winner - loser)
        right = torch.sigmoid(h) * (F.logsigmoid(h) - math.log(1 - self.epsilon))
        return right + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(self.epsilon))


@dataclass(frozen=True, kw_only=True)
class DiscoPOP:
    """Log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414).

    Starts in a trap: at temperature 0.05 its slope at h = 0 is +0.78, so the first step lowers the margin; it climbs only
    from h above 0.07. exp(-h) is continued linearly below h = -30, where it would overflow.
    """

    temperature: float = 0.05
    title = "Diffusion-DiscoPOP"

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        h = beta * (winner - loser)
        mix = torch.sigmoid(h / self.temperature)
        steep = math.exp(30.0) * (1 - (h.clamp(max=-30) + 30))
        return (1 - mix) * F.softplus(-h) + mix * torch.where(h < -30, steep, torch.exp(-h.clamp(min=-30)))


# --- of each side ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class FDivergence:
    """f-DPO (Wang et al. 2023, arXiv 2309.16240): -log sigmoid(beta (F(winner) - F(loser))).

    F: reverse_kl r (DPO); forward_kl 1 - e^-r; js ln 2 + log sigmoid(r); alpha (e^{(a-1) r} - 1)/(a-1). F needs the log-ratio
    itself, so ``scale`` turns our nats per element into the nats that F bends (the number of elements, for the whole latent);
    beta then multiplies F, not kappa. Above e^40 exponentials go on as straight lines, inside float32 and with their slope.
    """

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    alpha: float = 0.5
    scale: float = 1.0
    title = "Diffusion-f-DPO"

    def __post_init__(self):
        if self.divergence == "alpha" and self.alpha == 1:
            raise ValueError("alpha must differ from 1, where the divergence is reverse_kl")
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    @property
    def stretch(self) -> float:
        """What log-ratios are multiplied by, besides beta: an offset of the logit is divided by it as well."""
        return self.scale

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return F.softplus(-beta * (self._bend(winner * self.scale) - self._bend(loser * self.scale)))

    def _bend(self, r: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -_expm1(-r)
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(r)
        if self.divergence == "alpha":
            return _expm1((self.alpha - 1) * r) / (self.alpha - 1)
        return r


@dataclass(frozen=True)
class NCA:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv 2402.05369): keeps winners from becoming less likely."""

    title = "Diffusion-NCA"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        w, l = beta * winner, beta * loser
        return F.softplus(-w) + 0.5 * F.softplus(w) + 0.5 * F.softplus(l)


@dataclass(frozen=True)
class BCO:
    """Binary classifier optimisation on pairs (Jung et al. 2024, 2404.04656); the running mean is ``Pairwise.centre``."""

    title = "Diffusion-BCO"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return F.softplus(-beta * winner) + F.softplus(beta * loser)


@dataclass(frozen=True, kw_only=True)
class SPPO:
    """Hard self-play preference targets (Wu et al. 2024, arXiv 2405.00675): (c_w - 1/2b)^2 + (c_l + 1/2b)^2, a sum.

    scaled: times beta^2, as in ``Squared``.
    """

    scaled: bool = False
    title = "Diffusion-SPPO"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        loss = (winner - 1 / (2 * beta)) ** 2 + (loser + 1 / (2 * beta)) ** 2
        return loss * beta**2 if self.scaled else loss


@dataclass(frozen=True)
class APOZero:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv 2408.06266), when winners beat the model."""

    title = "Diffusion-APO-zero"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(-beta * winner) + torch.sigmoid(beta * loser)


@dataclass(frozen=True)
class APODown:
    """Anchored preference optimisation when winners are worse than the model: lowers the winner too, by design."""

    title = "Diffusion-APO-down"

    def __call__(self, winner: Tensor, loser: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(beta * winner) + torch.sigmoid(-beta * (winner - loser))


Link = Logistic | Robust | Squared | Hinge | EXO | DiscoPOP | FDivergence | NCA | BCO | SPPO | APOZero | APODown
