"""Latents drawn from a weight set by the training loop's own ``predict``: for methods that learn from samples of the model.

Keyed like all other randomness: a sample is a function of (weights, seed, key), so a resumed run draws the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import rng
from ..process import deterministic_step
from ..process.solver import at, move
from ..types import Cond


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """ddim: a deterministic solver in ``steps`` equal steps from noise to image. lcm: the image is predicted and noised again
    at each of ``timesteps`` (diffusers' numbers, 0 to 999, falling), as distilled models are sampled.

    guidance_scale: 1 has none, one pass a step; else two. Methods that learn from their own samples should leave it at 1, or
    they learn the guided distribution (seppo.md section 7.7).
    """

    steps: int = 20
    solver: Literal["ddim", "lcm"] = "ddim"
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float = 1.0

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be at least 1 and at most 1000, got {self.steps}")
        if self.timesteps is not None:
            falls = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:]))
            if not self.timesteps or not falls or not all(0 <= t < 1000 for t in self.timesteps):
                raise ValueError(f"timesteps must fall and lie in 0..999, got {list(self.timesteps)}")
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
                 unconditional: Cond | None = None) -> Tensor:
        """ctx: ``predict``, ``process``, ``param``, ``seed``. name: weight set. cond, unconditional: N rows. keys: [N, J].

        -> x0 [N, *shape] float32 on the condition's device, unit variance.
        """
        device, times = cond.tokens.device, self.times()
        x = rng.normal(ctx.seed, "sample", keys, shape).to(device)
        levels = [ctx.process.snap(torch.full((len(keys),), t, dtype=torch.float64, device=device)) for t in times]
        x = x * ctx.process.coefficients(levels[0])[1].view(-1, *[1] * len(shape))  # at the first level there is no image yet
        for number, (t, after) in enumerate(zip(levels, [*levels[1:], None])):
            raw = self._raw(ctx, name, x, t, cond, unconditional)
            if after is None:
                return ctx.param.to_x0(raw, at(ctx.process, x, t))
            if self.solver == "ddim":
                x = deterministic_step(ctx, x, raw, t, after)
            else:
                step = torch.full((len(keys), 1), number + 1, dtype=torch.int64)
                noise = rng.normal(ctx.seed, "renoise", torch.cat([keys, step], dim=1), shape).to(device)
                x = move(ctx.process, ctx.param.to_x0(raw, at(ctx.process, x, t)), noise, after)
        raise AssertionError("a sampler has at least one step")

    def _raw(self, ctx, name: str, x: Tensor, t: Tensor, cond: Cond, unconditional: Cond | None) -> Tensor:
        raw = ctx.predict(name, x, t, cond).float()
        if self.guidance_scale == 1:
            return raw
        empty = ctx.predict(name, x, t, unconditional).float()
        return empty + self.guidance_scale * (raw - empty)
