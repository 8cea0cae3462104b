"""Gaussian forward processes: ``xt = alpha(t) x0 + sigma(t) noise``, always in float32. t in (0, 1], 1 is noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Noised, carried
from .parameterization import like


class _Gaussian:
    """Noising shared by all processes; subclasses own the coefficients."""

    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Noised:
        """x0, eps: [N, *S]; t: [N] -> Noised in float32."""
        t = self.snap(t)
        alpha, sigma = self.coefficients(t)
        x0, eps = x0.float(), eps.float()
        xt = like(alpha, x0) * x0 + like(sigma, x0) * eps
        return Noised(x0=x0, xt=xt, noise=eps, t=t, alpha=alpha, sigma=sigma, log_snr=2 * (alpha.log() - sigma.log()))


@dataclass(frozen=True, eq=False)
class VariancePreserving(_Gaussian):
    """A discrete DDPM schedule. alphas_cumprod: [T] float32; the paper's step i+1 (index i) is time (i+1)/T.

    Source: Ho et al. 2020; index base as in notation.md section 1.
    """

    alphas_cumprod: Tensor

    @classmethod
    def from_scheduler(cls, scheduler) -> VariancePreserving:
        """From any diffusers scheduler with ``alphas_cumprod``."""
        return cls(scheduler.alphas_cumprod.detach().float().cpu())

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def snap(self, t: Tensor) -> Tensor:
        """To the next grid time in (0, 1]: t: [N] -> [N] float32."""
        return ((self.index(t) + 1).double() / self.steps).float()

    def index(self, t: Tensor) -> Tensor:
        """[N] times -> [N] int64 indices into alphas_cumprod (diffusers' timestep)."""
        # the small shift keeps (i+1)/T in float32 on index i although its product with T may exceed i+1
        return (torch.ceil(t.double() * self.steps - 1e-3).long() - 1).clamp(0, self.steps - 1)

    def timestep(self, t: Tensor) -> Tensor:
        """What the denoiser is told: [N] float32, 0..T-1."""
        return self.index(t).float()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = carried(self.alphas_cumprod, t.device)[self.index(t)]
        return abar.sqrt(), (1 - abar).sqrt()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """W(t) = T * gamma_t for the squared error of the noise, uniform t: [N] float32.

        gamma_t = (SNR_{t-1}/SNR_t - 1)/2, and 1/(2 alpha'_1) for the first step (notation.md section 4).
        """
        return carried(self._gamma, t.device)[self.index(t)] * self.steps

    @property
    def _gamma(self) -> Tensor:
        abar = self.alphas_cumprod.double()
        snr = abar / (1 - abar)
        first = 1 / (2 * abar[:1])
        return torch.cat([first, (snr[:-1] / snr[1:] - 1) / 2]).float()

    def grid(self) -> Tensor:
        """All times, [T] float32: to average a weight over."""
        return (torch.arange(1, self.steps + 1).double() / self.steps).float()


@dataclass(frozen=True, eq=False)
class RectifiedFlow(_Gaussian):
    """alpha = 1-t, sigma = t (Liu et al. 2022; SD3). Times are kept inside [t_min, 1 - t_min]: the ends have no SNR."""

    t_min: float = 1e-3
    timestep_scale: float = 1000.0
    steps: int = 1000

    def snap(self, t: Tensor) -> Tensor:
        return t.float().clamp(self.t_min, 1 - self.t_min)

    def timestep(self, t: Tensor) -> Tensor:
        """What the denoiser is told: [N] float32, sigma * 1000."""
        return t.float() * self.timestep_scale

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()
        return 1 - t, t

    def elbo_weight(self, t: Tensor) -> Tensor:
        """W(t) = -lambda'/2 = 1/(t(1-t)) for the squared error of the noise (notation.md section 5): [N] float32."""
        t = self.snap(t)
        return 1 / (t * (1 - t))

    def grid(self) -> Tensor:
        return self.snap((torch.arange(self.steps) + 0.5) / self.steps)


@dataclass(frozen=True, eq=False)
class Trigonometric(_Gaussian):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), continuous t (Stable Audio; Salimans & Ho 2022). The noise level of its
    scheduler is sigma / alpha, which runs to infinity at t = 1; times are kept inside [t_min, 1 - t_min].
    """

    t_min: float = 1e-3
    steps: int = 1000

    def snap(self, t: Tensor) -> Tensor:
        return t.float().clamp(self.t_min, 1 - self.t_min)

    def timestep(self, t: Tensor) -> Tensor:
        """What the denoiser is told: [N] float32, t itself."""
        return t.float()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t.double() * (math.pi / 2)
        return angle.cos().float(), angle.sin().float()

    def elbo_weight(self, t: Tensor) -> Tensor:
        """W(t) = -lambda'/2 = pi / sin(pi t) for the squared error of the noise; lambda = -2 log tan(pi t/2): [N] float32."""
        return math.pi / torch.sin(math.pi * self.snap(t))

    def grid(self) -> Tensor:
        return self.snap((torch.arange(self.steps) + 0.5) / self.steps)


Process = VariancePreserving | RectifiedFlow | Trigonometric
