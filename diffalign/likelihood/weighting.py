"""Weights on the squared error, W(t), by the names of notation.md section 5.

__call__(noised, param, process) -> [N] float32, a weight in the model's native error space. 'simple' is constant there;
the others are defined on the error of the noise (or of x0) and converted, so that they mean the same for every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..process import Parameterization, Process, RectifiedFlow
from ..types import Noised, carried


@dataclass(frozen=True)
class Simple:
    """Constant 1 in the model's native error space: what all published Diffusion-DPO runs use."""

    def __call__(self, noised: Noised, param: Parameterization, process: Process) -> Tensor:
        return torch.ones_like(noised.t)


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """The likelihood bound's own weight (T*gamma_t for DDPM; 1/(t(1-t)) on the noise error for a flow).

    normalise: divide by the mean over the process's times, so that beta keeps the scale it has under 'simple'; False gives
    true nats (per element). max: clamp of the weight on the noise error, before normalising and converting; it blows up as t
    goes to 0 and a few draws would rule.
    """

    normalise: bool = True
    max: float | None = 100.0

    def __post_init__(self):
        if self.max is not None and self.max <= 0:
            raise ValueError(f"max must be above 0, got {self.max}")

    def __call__(self, noised: Noised, param: Parameterization, process: Process) -> Tensor:
        weight = self._native(noised, param, process)
        if not self.normalise:
            return weight
        grid = carried(process.grid(), noised.t.device)
        ones = torch.zeros(len(grid), 1, device=grid.device)
        return weight / self._native(process.noise(ones, grid, ones), param, process).mean()

    def _native(self, noised: Noised, param: Parameterization, process: Process) -> Tensor:
        # twice the ELBO weight: the estimator's factor 1/2 is part of its convention, not of the bound
        weight = 2 * process.elbo_weight(noised.t)
        if self.max is not None:  # on the noise error, else the limit would mean SNR times less for a model that predicts x0
            weight = weight.clamp(max=2 * self.max)
        return weight * param.error_to_eps(noised)


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023, arXiv 2303.09556): min(SNR, gamma)/SNR on the noise error."""

    gamma: float = 5.0

    def __post_init__(self):
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")

    def __call__(self, noised: Noised, param: Parameterization, process: Process) -> Tensor:
        snr = noised.log_snr.exp()
        return snr.clamp(max=self.gamma) / snr * param.error_to_eps(noised)


UNBOUNDED = 100.0  # sigma/alpha at the noise end: 15 with the schedule of SD and SDXL, 4096 (a floor) at zero terminal SNR


@dataclass(frozen=True, kw_only=True)
class HighNoise:
    """1 + strength * (sigma/alpha, scaled to [0, 1] over the schedule), in the model's native error space.

    The reward scale of timestep-aware DPO (arXiv 2505.18736; strength 1): from 1 at the clean end to 2 at the noise end,
    inside the link, hence on beta. Where sigma/alpha has no bound (a flow, zero terminal SNR) t takes its place: scaled by its
    largest value all but the last times would weigh 1. A v or velocity error already
    weighs high noise up by 1/alpha^2 (timestep_aware_dpo.md 2e).
    """

    strength: float = 1.0

    def __post_init__(self):
        if self.strength < 0:
            raise ValueError(f"strength must be at least 0, got {self.strength}")

    def __call__(self, noised: Noised, param: Parameterization, process: Process) -> Tensor:
        alpha, sigma = process.coefficients(process.grid())
        ratio = sigma / alpha
        low, high = float(ratio.min()), float(ratio.max())
        if isinstance(process, RectifiedFlow) or high > UNBOUNDED:
            return 1 + self.strength * noised.t
        return 1 + self.strength * (noised.sigma / noised.alpha - low) / (high - low)


Weighting = Simple | ELBO | MinSNR | HighNoise
