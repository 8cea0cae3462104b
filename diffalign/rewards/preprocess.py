"""Pictures as CLIP-like models read them: resized, cut or padded to a square, normalised with CLIP's mean and deviation.

A PIL or uint8 picture goes through PIL exactly as the reference processors do it. A float tensor goes through torch's
antialiased bicubic resize, which has PIL's kernel, so gradients reach its pixels; it differs from the PIL path by PIL's
rounding to whole bytes after each of its two passes (tests/rewards/test_preprocess.py states by how much).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import UNREADABLE, as_pil, pixels

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of CLIP's training pictures, red, green, blue
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """One picture -> [3, size, size] float32, normalised (float64 where the picture is a float64 tensor).

    fit "crop": shortest side to ``size``, centre crop (CLIP). fit "letterbox": longest side to ``size``, zeros around it,
    then normalised, so that the border is CLIP's dark grey and not black (HPSv2); always on tensors, as its reference does.
    middle: where a crop with an odd rest begins: "floor" (the processors of transformers 4) or "round" (torchvision).
    antialias: of the letterbox only; torchvision before 0.17 resized tensors without it, and with a sharper kernel.
    """

    size: int = 224
    fit: Literal["crop", "letterbox"] = "crop"
    middle: Literal["floor", "round"] = "round"
    antialias: bool = True

    def __call__(self, image: Any) -> Tensor:
        return _normalise(self.unit(image))

    def unit(self, image: Any) -> Tensor:
        """[3, size, size] in [0, 1], before it is normalised."""
        if self.fit == "letterbox":
            return self._letterbox(_unit(image))
        if isinstance(image, Tensor) and image.is_floating_point():
            return self._crop(self._resize_short(_unit(image)))
        picture = as_pil(image)
        height, width = self._short_sizes(picture.height, picture.width)
        return self._crop(pixels(picture.resize((width, height), Image.Resampling.BICUBIC)))

    def _short_sizes(self, height: int, width: int) -> tuple[int, int]:
        """The shortest side becomes ``size``; the other is cut to whole pixels, as torchvision and transformers do."""
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _resize_short(self, picture: Tensor) -> Tensor:
        # PIL goes over the rows, then over the columns, and bytes cut off what bicubic overshoots at edges, both times
        height, width = self._short_sizes(*picture.shape[1:])
        rows = _resize(picture, (picture.shape[1], width), antialias=True).clamp(0, 1)
        return _resize(rows, (height, width), antialias=True).clamp(0, 1)

    def _crop(self, picture: Tensor) -> Tensor:
        top, left = (_middle(length - self.size, self.middle) for length in picture.shape[1:])
        return picture[:, top : top + self.size, left : left + self.size]

    def _letterbox(self, picture: Tensor) -> Tensor:
        scale = self.size / max(picture.shape[1:])
        height, width = (max(1, round(length * scale)) for length in picture.shape[1:])
        picture = _resize(picture, (height, width), antialias=self.antialias)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return F.pad(picture, (left, self.size - width - left, top, self.size - height - top))


def score_batches(score: Callable[[Tensor, Sequence[str]], Tensor], prepare: Callable[[Any], Tensor], images: Sequence[Any],
                  prompts: Sequence[str], batch_size: int) -> Tensor:
    """[N] float32: ``score(pictures [B, 3, S, S], their prompts) -> [B]`` in batches, NaN where a picture cannot be decoded.

    Raises ValueError where there is not one prompt per picture.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
    scores = []
    for rows in _chunks(zip(images, prompts, strict=True), batch_size):
        prepared = [_or_none(prepare, image) for image, _ in rows]
        good = [(picture, prompt) for picture, (_, prompt) in zip(prepared, rows, strict=True) if picture is not None]
        found = iter(score(torch.stack([p for p, _ in good]), [text for _, text in good]).float().cpu() if good else ())
        scores += [torch.tensor(torch.nan) if picture is None else next(found) for picture in prepared]
    return torch.stack(scores) if scores else torch.zeros(0)


def _chunks(rows: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _or_none(prepare: Callable[[Any], Tensor], image: Any) -> Tensor | None:
    try:
        return prepare(image)
    except UNREADABLE:
        return None


def _unit(image: Any) -> Tensor:
    """[3, H, W] in [0, 1]; float64 stays float64, for gradient checks."""
    picture = image if isinstance(image, Tensor) and image.dtype == torch.float64 else pixels(image)
    if picture.ndim != 3 or picture.shape[0] != 3 or not picture.numel():
        raise TypeError(f"a float picture is [3, H, W] in [0, 1], not {list(picture.shape)}")
    return picture


def _resize(picture: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    if tuple(picture.shape[1:]) == size:
        return picture
    return F.interpolate(picture[None], size=size, mode="bicubic", align_corners=False, antialias=antialias)[0]


def _middle(rest: int, how: str) -> int:
    return rest // 2 if how == "floor" else round(rest / 2)   # Python and torchvision round halves to even


def _normalise(picture: Tensor) -> Tensor:
    mean, deviation = (picture.new_tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return (picture - mean) / deviation
