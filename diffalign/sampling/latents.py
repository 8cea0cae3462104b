"""Latents drawn from a weight set by the training loop's own ``predict``: for methods that learn from samples of the model.

Keyed like all other randomness: a sample is a function of (weights, seed, key), so a resumed run draws the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import rng
from ..process.parameterization import like
from ..process.solver import at, guided, stochastic_step
from ..types import Cond, carried


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """ddim: deterministic, in ``steps`` equal steps from noise to image. lcm: the image is predicted and noised afresh at
    every level (LCM, DMD2). ancestral: DDPM's posterior, which is Euler-ancestral (SDXL-Turbo), its standard deviation times
    eta (DDIM's). timesteps: the levels, diffusers' numbers, 0 to 999, falling, as distilled models want them; they take the
    place of ``steps``.

    guidance_scale: 1 has none, one pass a step; else two. Methods that learn from their own samples should leave it at 1, or
    they learn the guided distribution.
    """

    steps: int = 20
    solver: Literal["ddim", "lcm", "ancestral"] = "ddim"
    timesteps: tuple[int, ...] | None = None
    eta: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be at least 1 and at most 1000, got {self.steps}")
        if self.timesteps is not None:
            falls = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:]))
            if not self.timesteps or not falls or not all(0 <= t < 1000 for t in self.timesteps):
                raise ValueError(f"timesteps must fall and lie in 0..999, got {list(self.timesteps)}")
        if not 0 < self.eta <= 1 or self.eta != 1 and self.solver != "ancestral":
            raise ValueError(f"eta must be above 0 and at most 1, and belongs to the solver ancestral, got {self.eta}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")

    @property
    def forwards(self) -> int:
        """Passes of the model for one sample."""
        return len(self.times()) * (1 if self.guidance_scale == 1 else 2)

    def times(self) -> list[float]:
        """Noise levels at which the model is asked, falling; the last step ends in the predicted image."""
        if self.timesteps is not None:
            return [(t + 1) / 1000 for t in self.timesteps]
        return [1 - i / self.steps for i in range(self.steps)]

    @torch.no_grad()
    def __call__(self, ctx, name: str, cond: Cond, keys: Tensor, shape: tuple[int, ...],
                 unconditional: Cond | None = None) -> tuple[Tensor, Tensor]:
        """ctx: ``predict``, ``process``, ``param``, ``seed``. name: weight set. cond, unconditional: N rows. keys: [N, J].

        -> x0 [N, *shape] float32, unit variance, and the latents at every level, [N, levels, *shape]; on the condition's
        device.
        """
        device = cond.tokens.device
        x, states = carried(rng.normal(ctx.seed, "sample", keys, shape), device), []
        levels = self.levels(ctx.process, device)
        for number, level in enumerate(levels):
            states.append(x)
            t = level.expand(len(keys))
            raw = guided(ctx, name, x, t, cond, unconditional, self.guidance_scale)
            if number + 1 == len(levels):
                return ctx.param.to_x0(raw, at(ctx.process, x, t)), torch.stack(states, dim=1)
            x, std = stochastic_step(ctx, x, raw, t, levels[number + 1].expand(len(keys)), self.solver, self.eta)
            if self.solver != "ddim":
                step = torch.full((len(keys), 1), number + 1, dtype=torch.int64)
                noise = carried(rng.normal(ctx.seed, "renoise", torch.cat([keys, step], dim=1), shape), device)
                x = x + like(std, x) * noise
        raise AssertionError("a sampler has at least one level")

    def levels(self, process, device=None) -> Tensor:
        """[levels] float32 on the process's own grid."""
        return process.snap(torch.tensor(self.times(), dtype=torch.float64, device=device))
