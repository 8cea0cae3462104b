"""What a reward is, and the one place where pictures are converted for rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Reward(Protocol):
    """images: N pictures, prompts: N texts -> [N] float32, higher is better.

    NaN means "could not score", never 0. No side effects: the same picture has the same score, alone or in a batch.
    t: [N] noise levels for rewards that read noisy latents; the others ignore it. differentiable: whether gradients reach
    the pictures when they are a float tensor.
    """

    name: str
    differentiable: bool

    def __call__(self, images: Any, prompts: Sequence[str], t: Any = None) -> Tensor: ...


def pixels(image: Any) -> Tensor:
    """One picture -> [3, H, W] float32 in [0, 1]. Gradients are kept when it is a float tensor.

    Accepts a PIL image, a uint8 array or tensor ([H, W, 3] or [3, H, W]) or a float tensor [3, H, W] in [0, 1].
    """
    if isinstance(image, Tensor) and image.is_floating_point():
        return image.float()
    array = _bytes(image)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float() / 255


def as_pil(image: Any) -> Image.Image:
    """One picture as RGB PIL, from anything that ``pixels`` accepts. A float value of 0.5 becomes 128 (rounded half up)."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor) and image.is_floating_point():
        image = (image.detach().float().clamp(0, 1) * 255 + 0.5).byte().cpu()
    return Image.fromarray(_bytes(image))


def _bytes(image: Any) -> np.ndarray:
    """uint8 [H, W, 3]."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise TypeError(f"a picture is PIL, uint8 [H, W, 3] or [3, H, W], or float [3, H, W]; not {array.dtype} {array.shape}")
    return array if array.shape[-1] == 3 else array.transpose(1, 2, 0)


def score_each(one, images: Iterable[Any], prompts: Sequence[str]) -> Tensor:
    """[N] float32: ``one(image)`` for each picture, NaN where a picture cannot be decoded."""
    images = list(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
    scores = [_or_nan(one, image) for image in images]
    return torch.stack(scores) if scores else torch.zeros(0)


def _or_nan(one, image: Any) -> Tensor:
    try:
        return torch.as_tensor(one(image), dtype=torch.float32)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # what PIL raises for a truncated or broken file
        return torch.tensor(torch.nan)
