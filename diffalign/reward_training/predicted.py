"""What a step-aware reward is trained on: the pictures that a denoiser predicts from noised ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.load import load_denoiser, load_encoders
from ..models.spec import ModelSpec
from ..process.solver import guided
from ..rewards.preprocess import Preprocess
from ..types import Cond, Noised


class Predicted:
    """A frozen pipeline. fit.unit: a picture -> [3, S, S] in [0, 1] at its own resolution."""

    def __init__(self, spec: ModelSpec, guidance_scale: float, device: torch.device):
        self.encoders, self.denoiser = load_encoders(spec, device), load_denoiser(spec, device=device)
        self.scale = guidance_scale
        self.denoiser.module.requires_grad_(False)
        self.device, self.fit = device, Preprocess(size=self.encoders.default_resolution)

    def latents(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] in [0, 1] -> the posterior's mean [N, C, h, w]."""
        return self.encoders.encode_images(2 * pictures - 1)[0]

    @torch.no_grad()
    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Noised:
        """x0, noise [N, C, h, w] at the levels t [N] -> Noised, whose ``t`` are the schedule's own levels."""
        return self.denoiser.process.noise(x0, t.to(x0.device), noise.to(x0.device))

    @torch.no_grad()
    def __call__(self, noised: Noised, prompts: Sequence[str]) -> Tensor:
        """N noised latents and their prompts -> predicted pictures [N, 3, S, S] in [0, 1]."""
        n = len(prompts)
        cond = self._cond(*self.encoders.encode_prompts(list(prompts)), n)
        empty = None if self.scale == 1 else self._cond(*self.encoders.unconditional(), n)
        raw = guided(self, "frozen", noised.xt, noised.t, cond, empty, self.scale)
        return (self.encoders.decode(self.denoiser.param.to_x0(raw, noised)) + 1) / 2

    def predict(self, name: str, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The one weight set there is."""
        return self.denoiser(x, t, cond)

    def _cond(self, tokens: Tensor, pooled: Tensor | None, n: int) -> Cond:
        """SDXL is told the size of an uncropped picture."""
        side = self.encoders.default_resolution
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=self.device)
        return Cond(tokens=tokens.expand(n, -1, -1), pooled=None if pooled is None else pooled.expand(n, -1),
                    extra={"time_ids": sizes.expand(n, 6)})
