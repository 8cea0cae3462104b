"""Which times a group is noised at. One time per (group, draw), shared by the candidates and by all weight sets.

draw(seed, keys) -> [N] float64 in (0, 1); the process snaps it to its grid. Times are keyed: they don't depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform between low and high (Diffusion-DPO: 0 to 1)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"needs 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def draw(self, seed: int, keys: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * rng.uniform(seed, "time", keys)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigmoid(mean + std * normal): SD3's density (Esser et al. 2024). Not divided out: an implicit weight, so 'simple'."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def draw(self, seed: int, keys: Tensor) -> Tensor:
        u = rng.uniform(seed, "time", keys).clamp(1e-12, 1 - 1e-12)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """One of a few diffusers timesteps (0..999), each as likely: for timestep-distilled models, (249, 499, 749, 999)."""

    timesteps: tuple[int, ...]

    def __post_init__(self):
        if not self.timesteps or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps must lie in 0..999, got {list(self.timesteps)}")

    def draw(self, seed: int, keys: Tensor) -> Tensor:
        pick = (rng.uniform(seed, "time", keys) * len(self.timesteps)).long()
        return (torch.tensor(self.timesteps, dtype=torch.float64)[pick] + 1) / 1000


Times = Uniform | LogitNormal | Discrete
