"""A step between two noise levels, in either direction, for every process and parameterization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Noised
from .parameterization import like


def at(process, x: Tensor, t: Tensor) -> Noised:
    """What a parameterization needs to convert a prediction made at (x, t). x0 and noise are not known: they hold ``x``."""
    alpha, sigma = process.coefficients(t)
    return Noised(x0=x, xt=x, noise=x, t=t, alpha=alpha, sigma=sigma, log_snr=2 * (alpha.log() - sigma.log()))


def move(process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """alpha x0 + sigma eps at the level t [N]: x0, eps [N, *S]."""
    alpha, sigma = process.coefficients(t)
    return like(alpha, x0) * x0 + like(sigma, x0) * eps


def guided(ctx, name: str, x: Tensor, t: Tensor, cond, unconditional, scale: float) -> Tensor:
    """The prediction [N, *S] float32 of a weight set under classifier-free guidance; scale 1 is none and costs one pass."""
    raw = ctx.predict(name, x, t, cond).float()
    if scale == 1:
        return raw
    empty = ctx.predict(name, x, t, unconditional).float()
    return empty + scale * (raw - empty)


def stochastic_step(ctx, x: Tensor, raw: Tensor, t: Tensor, to: Tensor, solver: str, eta: float = 1.0
                    ) -> tuple[Tensor, Tensor]:
    """Mean [N, *S] and standard deviation [N] of the Gaussian transition from level t to the level ``to``, both [N].

    x, raw: [N, *S], the latent and the prediction at t. ctx: ``process`` and ``param``.

    mean = alpha' x0-hat + sqrt(sigma'^2 - std^2) eps-hat. lcm: std = sigma', the predicted image noised afresh. ancestral: the
    DDPM posterior's times eta, which is Euler-ancestral's sigma_up in VE coordinates (pso.md 2a) and DDIM's with that eta
    (Song et al. 2020, Eq. 16). ddim: 0, DDIM with eta 0, on a rectified flow Euler's step; it works towards noise as well.
    """
    here, sigma = at(ctx.process, x, t), ctx.process.coefficients(to)[1]
    std = {"lcm": lambda: sigma, "ddim": lambda: 0 * sigma,
           "ancestral": lambda: eta * bridge_std(ctx.process, to, t)}[solver]()
    alpha, rest = ctx.process.coefficients(to)[0], (sigma**2 - std**2).clamp(min=0).sqrt()
    return like(alpha, x) * ctx.param.to_x0(raw, here) + like(rest, x) * ctx.param.to_eps(raw, here), std


def bridge_std(process, low: Tensor, high: Tensor) -> Tensor:
    """[N] standard deviation of q(x_low | x_high, x0), the DDPM posterior: what eta = 1 adds in a step between the levels."""
    (a, s), (a1, s1) = process.coefficients(low), process.coefficients(high)
    between = (s1**2 - (a1 / a) ** 2 * s**2).clamp(min=0)
    return torch.sqrt(between) * s / s1
