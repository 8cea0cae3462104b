"""Exact, tiny rewards that read nothing but pixels: for tests, and to see whether an aligned model's pictures drift.

The prompt is ignored. Brightness and compressibility are the classic checks of DDPO (arXiv 2305.13301); colourfulness is
Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), equation for M^(3).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import as_pil, pixels, score_each


@dataclass(frozen=True)
class Brightness:
    """Mean luma (ITU-R BT.601), in [0, 1]: black 0, white 1."""

    name = "brightness"
    differentiable = True

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        return score_each(self._one, images, prompts)

    def _one(self, image: Any) -> Tensor:
        red, green, blue = pixels(image)
        return (0.299 * red + 0.587 * green + 0.114 * blue).mean()


@dataclass(frozen=True)
class Colourfulness:
    """sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) on a 0..255 scale; grey is 0, vivid about 100."""

    name = "colourfulness"
    differentiable = True

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        return score_each(self._one, images, prompts)

    def _one(self, image: Any) -> Tensor:
        red, green, blue = 255 * pixels(image)
        opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)  # [2, H*W]
        spread, centre = opponents.var(1, correction=0).sum(), opponents.mean(1).square().sum()
        return _sqrt(spread) + 0.3 * _sqrt(centre)


@dataclass(frozen=True, kw_only=True)
class Compressibility:
    """Minus the kilobytes (1,000 bytes) of the picture as a JPEG: fewer bytes, higher score. A smoothness alarm."""

    quality: int = 95
    name = "compressibility"
    differentiable = False

    def __post_init__(self):
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}")

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        return score_each(self._one, images, prompts)

    def _one(self, image: Any) -> float:
        target = io.BytesIO()
        as_pil(image).save(target, "JPEG", quality=self.quality)
        return -target.tell() / 1000


def _sqrt(x: Tensor) -> Tensor:
    """The square root with gradient 0, not infinite, at 0 (a grey picture)."""
    return torch.where(x > 0, x.clamp(min=1e-12).sqrt(), torch.zeros_like(x))
