"""What a denoiser predicts, and the exact conversions between predictions (notation.md, section 2).

raw: [N, *S], in the model's native space. ``error_to_eps(noised)`` [N] is the factor that turns a squared error in native
space into a squared error of the noise: eps 1, x0 SNR, v alpha^2 (variance preserving), velocity alpha^2 = (1-t)^2 (flow).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..types import Noised


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] with as many axes as x."""
    return coefficient.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


@dataclass(frozen=True)
class Eps:
    """The noise itself (SD 1.x, SDXL)."""

    def target(self, n: Noised) -> Tensor:
        return n.noise

    def to_x0(self, raw: Tensor, n: Noised) -> Tensor:
        return (n.xt - like(n.sigma, raw) * raw) / like(n.alpha, raw)

    def to_eps(self, raw: Tensor, n: Noised) -> Tensor:
        return raw

    def error_to_eps(self, n: Noised) -> Tensor:
        return n.alpha.new_ones(n.alpha.shape)


@dataclass(frozen=True)
class X0:
    """The clean latent ("sample" in diffusers)."""

    def target(self, n: Noised) -> Tensor:
        return n.x0

    def to_x0(self, raw: Tensor, n: Noised) -> Tensor:
        return raw

    def to_eps(self, raw: Tensor, n: Noised) -> Tensor:
        return (n.xt - like(n.alpha, raw) * raw) / like(n.sigma, raw)

    def error_to_eps(self, n: Noised) -> Tensor:
        return (n.alpha / n.sigma) ** 2


@dataclass(frozen=True)
class V:
    """v = alpha*eps - sigma*x0 (Salimans & Ho 2022; SD 2.x). Needs alpha^2 + sigma^2 = 1."""

    def target(self, n: Noised) -> Tensor:
        return like(n.alpha, n.x0) * n.noise - like(n.sigma, n.x0) * n.x0

    def to_x0(self, raw: Tensor, n: Noised) -> Tensor:
        return like(n.alpha, raw) * n.xt - like(n.sigma, raw) * raw

    def to_eps(self, raw: Tensor, n: Noised) -> Tensor:
        return like(n.alpha, raw) * raw + like(n.sigma, raw) * n.xt

    def error_to_eps(self, n: Noised) -> Tensor:
        return n.alpha**2


@dataclass(frozen=True)
class Velocity:
    """u = eps - x0 on a rectified flow, alpha = 1-t and sigma = t (SD3, FLUX)."""

    def target(self, n: Noised) -> Tensor:
        return n.noise - n.x0

    def to_x0(self, raw: Tensor, n: Noised) -> Tensor:
        return n.xt - like(n.sigma, raw) * raw

    def to_eps(self, raw: Tensor, n: Noised) -> Tensor:
        return n.xt + like(n.alpha, raw) * raw

    def error_to_eps(self, n: Noised) -> Tensor:
        return n.alpha**2


Parameterization = Eps | X0 | V | Velocity
