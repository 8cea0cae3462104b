"""Which times a group is noised at. One time per (group, draw), shared by the candidates and by all weight sets.

at(u): [N] float64 in [0, 1) -> times [N] float64 in [0, 1], which the process snaps to its grid; ``sequences`` says where the
u come from. correction(t) -> [N] float32, uniform density / own density, or None where the density is meant as a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import carried


def _between(u: Tensor) -> Tensor:
    return u.clamp(1e-12, 1 - 1e-12)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform between low and high (Diffusion-DPO: 0 to 1)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"needs 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def at(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def correction(self, t: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigmoid(mean + std * normal): SD3's density (Esser et al. 2024). Not divided out: an implicit weight, so 'simple'."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def at(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(_between(u)))

    def correction(self, t: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """``share`` uniform, the rest logit-normal. corrected: divide the density out, so that the objective is that of uniform
    times and only the variance of its gradient changes; the weight is at most 1/share."""

    share: float = 0.5
    mean: float = 0.0
    std: float = 1.0
    corrected: bool = True

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def at(self, u: Tensor) -> Tensor:
        rest = LogitNormal(mean=self.mean, std=self.std)
        if self.share == 1:
            return u
        return torch.where(u < self.share, u / self.share, rest.at(((u - self.share) / (1 - self.share)).clamp(min=0)))

    def correction(self, t: Tensor) -> Tensor | None:
        if not self.corrected:
            return None
        t = _between(t.double())
        z = (torch.logit(t) - self.mean) / self.std
        normal = torch.exp(-z * z / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return (1 / (self.share + (1 - self.share) * normal)).float()


@dataclass(frozen=True, kw_only=True)
class Geometric:
    """Bins of equal width with weights ratio^k, k = 0 at the noise end, uniform inside a bin: skewed to high noise.

    Timestep-aware DPO (arXiv 2505.18736) with ratio 0.9. Its granularity is not published and decides everything: over 10 bins
    the noisiest tenth gets 15 % of the draws, over 50 bins 41 %, over 1000 nearly all (timestep_aware_dpo.md 2c).
    corrected: divide the density out, see ``Mixture``.
    """

    ratio: float = 0.9
    bins: int = 10
    corrected: bool = False

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        if not 1 <= self.bins <= 1000:
            raise ValueError(f"bins must be at least 1 and at most 1000, got {self.bins}")

    @property
    def _shares(self) -> Tensor:
        """[bins] float64, cleanest first."""
        weights = self.ratio ** torch.arange(self.bins - 1, -1, -1, dtype=torch.float64)
        return weights / weights.sum()

    def at(self, u: Tensor) -> Tensor:
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), self._shares.cumsum(0)])
        k = (torch.searchsorted(edges, u.double(), right=True) - 1).clamp(0, self.bins - 1)
        inside = ((u - edges[k]) / self._shares[k]).clamp(0, 1)
        return (k + inside) / self.bins

    def correction(self, t: Tensor) -> Tensor | None:
        if not self.corrected:
            return None
        # a time on a bin's upper edge belongs to it: the grid of a schedule is (i+1)/T, in float32 up to 3e-8 away
        k = (torch.ceil(t.double() * self.bins - 1e-4).long() - 1).clamp(0, self.bins - 1)
        return (1 / (self.bins * carried(self._shares, t.device)[k])).float()


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """One of a few diffusers timesteps (0..999), each as likely: for timestep-distilled models, (249, 499, 749, 999).

    On a rectified flow number n is sigma = (n + 1)/1000, so that these four are the quarters.
    """

    timesteps: tuple[int, ...]

    def __post_init__(self):
        if not self.timesteps or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps must lie in 0..999, got {list(self.timesteps)}")

    def at(self, u: Tensor) -> Tensor:
        pick = (u * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)
        return (torch.tensor(self.timesteps, dtype=torch.float64)[pick] + 1) / 1000

    def correction(self, t: Tensor) -> Tensor | None:
        return None


Times = Uniform | LogitNormal | Mixture | Geometric | Discrete
