"""Aspect buckets: the shapes a group may be cropped to. Pictures are scaled to cover the bucket and cropped, never stretched.

A group's bucket is the one nearest (in log aspect) to the geometric mean of its candidates' aspects: no candidate is
privileged, so the crop says nothing about who won.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import DataError

# width / height. The ladder is ours and not a library's: another list would be another cache and another data order.
ASPECTS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))
LEAST_KEPT = 1 / 8  # a crop that keeps less of a picture than this shows something else; also bounds the memory of resizing


@dataclass(frozen=True, slots=True)
class Crop:
    """How one picture becomes bucket pixels: scaled to ``resized`` (h, w), then cut at (top, left), both in scaled pixels."""

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    bucket: tuple[int, int]

    @property
    def left_flipped(self) -> int:
        """``left`` of the same cut in the mirrored picture: what SDXL is told when the group is flipped."""
        return self.resized[1] - self.left - self.bucket[1]


def buckets(resolution: int, spatial_factor: int, aspect_ratio_buckets: bool) -> list[tuple[int, int]]:
    """(height, width) in pixels, the square first. Raises DataError when the VAE cannot encode the square."""
    if resolution % spatial_factor:
        good = max(spatial_factor, round(resolution / spatial_factor) * spatial_factor)
        raise DataError(f"data.resolution: {resolution} is no multiple of the VAE's factor {spatial_factor}; take {good}")
    square = [(resolution, resolution)]
    if not aspect_ratio_buckets:
        return square
    step = divisor(resolution, spatial_factor)
    return list(dict.fromkeys(square + [_shape(resolution, w / h, step) for w, h in ASPECTS]))


def divisor(resolution: int, spatial_factor: int) -> int:
    """Bucket sides are multiples of this: 64 pixels from 512 pixels upwards with a VAE of factor 8, less for tiny models."""
    least = 2 * spatial_factor
    return max(least, min(8 * spatial_factor, resolution // 8 // least * least))


def _shape(resolution: int, aspect: float, step: int) -> tuple[int, int]:
    height, width = resolution / math.sqrt(aspect), resolution * math.sqrt(aspect)
    return tuple(max(step, round(side / step) * step) for side in (height, width))


def nearest(sizes: Sequence[tuple[int, int]], options: Sequence[tuple[int, int]]) -> int:
    """Index of the bucket for a group of pictures with these (height, width); the first of equals."""
    aspect = sum(math.log(w / h) for h, w in sizes) / len(sizes)
    return min(range(len(options)), key=lambda i: abs(math.log(options[i][1] / options[i][0]) - aspect))


def plan(size: tuple[int, int], bucket: tuple[int, int], where: str, place: tuple[float, float] | None = None) -> Crop:
    """The smallest scaling that covers the bucket, and the cut. place: (vertical, horizontal) in [0, 1); None: the middle.

    Raises DataError when the cut keeps less than an eighth of the picture.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = tuple(max(least, round(side * scale)) for side, least in zip(size, bucket, strict=True))
    kept = bucket[0] * bucket[1] / (resized[0] * resized[1])
    if kept < LEAST_KEPT:
        raise DataError(f"{where}: a picture of {size[1]} x {size[0]} pixels would lose {1 - kept:.0%} of itself "
                        f"in a crop to {bucket[1]} x {bucket[0]}; crop it yourself or set data.aspect_ratio_buckets=true")
    spare = [resized[i] - bucket[i] for i in (0, 1)]
    if place is None:
        top, left = (round(n / 2) for n in spare)
    else:
        top, left = (int((n + 1) * p) for n, p in zip(spare, place, strict=True))
    return Crop(original=tuple(size), resized=resized, top=top, left=left, bucket=tuple(bucket))


def apply(image: Image.Image, crop: Crop, flipped: bool = False) -> Image.Image:
    """Scaled with antialiased Lanczos, cut to the bucket, mirrored if ``flipped``."""
    h, w = crop.resized
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.LANCZOS)
    image = image.crop((crop.left, crop.top, crop.left + crop.bucket[1], crop.top + crop.bucket[0]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
