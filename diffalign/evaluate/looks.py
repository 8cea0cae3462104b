"""What pictures look like, in cheap numbers: the first thing to move when a model learns to please a reward.

Each look takes one picture and gives one number; the prompt is ignored. Users of trainers that optimise a reward meet the
same few forms again and again: colour casts and over-saturation, washed-out or black pictures, lost detail, fine grids, and
one picture whatever the seed. ``looks`` measures a list of pictures, ``spread`` the variety inside a prompt.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..rewards.base import UNREADABLE, as_pil

EDGE = 0.1         # change of luma per pixel, white being 1, that counts as an edge
EDGE_SIDE = 256    # pixels: larger pictures are measured at this size, so that an edge is as steep at any resolution
HIGH = 0.25        # cycles per pixel: half of the highest frequency that pixels can hold
PERIODS = (8, 16)  # pixels: of a latent, and of a transformer's patch of 2 x 2 latents
LEVELS = 8         # per channel, for the entropy: 512 colours
QUALITY = 95       # of the JPEG
SMALL = 32         # pixels: the side at which pictures are compared with each other
STEP = 1 / 255     # of an 8-bit channel; a rounded value is off by a variance of STEP^2 / 12


@dataclass(frozen=True, kw_only=True)
class Look:
    """One statistic of a picture.

    measure: uint8 [H, W, 3] -> number, in ``unit``. least: the smallest standard deviation worth dividing by, in ``unit``:
    pictures that are all alike would otherwise turn a change that nobody sees into hundreds of standard deviations.
    """

    measure: Callable[[np.ndarray], float]
    unit: str
    least: float

    def __call__(self, image: Any) -> float:
        """image: PIL, uint8 [H, W, 3] or [3, H, W], or float tensor [3, H, W] in [0, 1]. NaN where it cannot be decoded."""
        array = _decoded(image)
        return float("nan") if array is None else float(self.measure(array))


def saturation(rgb: np.ndarray) -> float:
    """Mean of HSV's S = (max - min) / max over pixels: 0 grey, 1 pure colours; black counts as 0."""
    channels = rgb.astype(np.float32)
    top = channels.max(2)
    return float(((top - channels.min(2)) / np.maximum(top, 1)).mean())


def brightness(rgb: np.ndarray) -> float:
    """Mean luma (ITU-R BT.601): 0 black, 1 white."""
    return float(_luma(rgb).mean())


def contrast(rgb: np.ndarray) -> float:
    """Standard deviation of luma over pixels (root mean square contrast, Peli 1990): 0 flat, at most 0.5."""
    return float(_luma(rgb).std())


def colourfulness(rgb: np.ndarray) -> float:
    """Hasler and Süsstrunk (2003), M^(3): sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2); vivid is about 100,
    half red and half green pixels give 293."""
    red, green, blue = rgb.astype(np.float64).transpose(2, 0, 1)
    opponents = np.stack([red - green, (red + green) / 2 - blue]).reshape(2, -1)
    return float(np.sqrt(opponents.var(1).sum()) + 0.3 * np.sqrt((opponents.mean(1) ** 2).sum()))


def edge_density(rgb: np.ndarray) -> float:
    """Share of pixels whose luma gradient (central differences) exceeds EDGE, at a longer side of at most EDGE_SIDE pixels."""
    luma = _luma(_shrunk(rgb, EDGE_SIDE))
    if min(luma.shape) < 2:
        return 0.0
    down, across = np.gradient(luma)
    return float((np.hypot(down, across) > EDGE).mean())


def high_frequency(rgb: np.ndarray) -> float:
    """Decibels of luma power above HIGH cycles per pixel relative to all power but the mean's: noise, grain and fine grids
    raise it, smoothing lowers it. Hann window against the picture's border; the noise of rounding to 8 bits is added to both,
    so that an even picture has white noise's value, not minus infinity.
    """
    luma = _luma(rgb)
    window = np.outer(np.hanning(luma.shape[0] + 2)[1:-1], np.hanning(luma.shape[1] + 2)[1:-1])
    power = np.abs(np.fft.fft2((luma - np.average(luma, weights=window)) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(luma.shape[0])[:, None], np.fft.fftfreq(luma.shape[1]))
    power += STEP**2 / 12 * (window**2).sum()
    return float(10 * np.log10(power[radius >= HIGH].sum() / power.sum())) if (radius >= HIGH).any() else 0.0


def grid(rgb: np.ndarray) -> float:
    """Decibels of a regular grid of 8 or 16 pixels above its surroundings, the stronger of the two; 0 without one.

    Wang, Bovik and Evans (2000), "Blind measurement of blocking artifacts": the absolute differences of neighbouring pixels
    are averaged along the lines of a grid, and the power of that profile at the grid's harmonics is compared with the median
    power. The mean of rows and columns. 0 for pictures of fewer than four periods.
    """
    luma = _luma(rgb)
    profiles = [np.abs(np.diff(luma, axis=1)).mean(0), np.abs(np.diff(luma, axis=0)).mean(1)]
    return max(float(np.mean([_peaks(profile, period) for profile in profiles])) for period in PERIODS)


def colour_entropy(rgb: np.ndarray) -> float:
    """Bits per pixel of the colours' histogram, 8 levels a channel: 0 for one colour, at most 9."""
    level = rgb.astype(np.int64) * LEVELS // 256
    counts = np.bincount((level[..., 0] * LEVELS + level[..., 1]).ravel() * LEVELS + level[..., 2].ravel())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no minus zero


def jpeg_size(rgb: np.ndarray) -> float:
    """Bits per pixel as a JPEG of quality 95, header included: little for smooth pictures."""
    target = io.BytesIO()
    Image.fromarray(rgb).save(target, "JPEG", quality=QUALITY)
    return 8 * target.tell() / (rgb.shape[0] * rgb.shape[1])


LOOKS: dict[str, Look] = {
    "brightness": Look(measure=brightness, unit="luma, 0 to 1", least=0.02),
    "contrast": Look(measure=contrast, unit="luma, 0 to 0.5", least=0.01),
    "saturation": Look(measure=saturation, unit="share, 0 to 1", least=0.02),
    "colourfulness": Look(measure=colourfulness, unit="0 to about 300", least=2.0),
    "colour entropy": Look(measure=colour_entropy, unit="bits, 0 to 9", least=0.1),
    "edge density": Look(measure=edge_density, unit="share, 0 to 1", least=0.01),
    "high-frequency energy": Look(measure=high_frequency, unit="dB of all power", least=0.5),
    "grid energy": Look(measure=grid, unit="dB over the median", least=1.0),
    "JPEG size": Look(measure=jpeg_size, unit="bits per pixel", least=0.1),
}


def looks(images: Sequence[Any]) -> np.ndarray:
    """images: N pictures of any kind and size -> [statistics, N] float64, in the order of ``LOOKS``; NaN where a picture
    cannot be decoded.
    """
    table = np.full((len(LOOKS), len(images)), np.nan)
    for column, image in enumerate(images):
        array = _decoded(image)
        if array is not None:
            table[:, column] = [look.measure(array) for look in LOOKS.values()]
    return table


def spread(images: Sequence[Any], per_prompt: int, features: Callable[[Sequence[Any]], Any] | None = None) -> np.ndarray:
    """Diversity inside prompts: images: P * S pictures, a prompt's S in a row -> [P], the mean distance of its pairs.

    Distances are root mean squares: over the pixels of the pictures brought to 32 x 32, on a scale of 0 to 255; or over the
    columns of ``features(images)``, [N, D]. NaN with one picture a prompt, or one that cannot be decoded.
    """
    if per_prompt < 1 or len(images) % per_prompt:
        raise ValueError(f"{len(images)} pictures are not {per_prompt} a prompt")
    if per_prompt == 1 or not len(images):
        return np.full(len(images) // per_prompt, np.nan)
    flat = np.stack([_thumbnail(image) for image in images]) if features is None else np.asarray(features(images), np.float64)
    groups = flat.reshape(len(images) // per_prompt, per_prompt, -1)
    first, second = np.triu_indices(per_prompt, 1)
    return np.stack([np.sqrt(((group[first] - group[second]) ** 2).mean(1)).mean() for group in groups])


def _peaks(profile: np.ndarray, period: int) -> float:
    """Decibels of the mean power at a period's harmonics over the median of the other frequencies, never below 0."""
    length = len(profile) // period * period
    if length < 4 * period - period:  # of four periods of pixels, three of differences are whole
        return 0.0
    power = np.abs(np.fft.rfft(profile[:length] - profile[:length].mean())) ** 2
    harmonics = np.arange(length // period, len(power), length // period)
    others = np.delete(power, [0, *harmonics])
    floor = STEP**2 * length  # a profile this even has no grid that anybody sees
    return max(0.0, float(10 * np.log10((power[harmonics].mean() + floor) / (np.median(others) + floor))))


def _decoded(image: Any) -> np.ndarray | None:
    try:
        return np.asarray(as_pil(image))
    except UNREADABLE:
        return None


def _luma(rgb: np.ndarray) -> np.ndarray:
    """[H, W] float64 in [0, 1], ITU-R BT.601."""
    return rgb @ np.array([0.299, 0.587, 0.114]) / 255


def _shrunk(rgb: np.ndarray, side: int) -> np.ndarray:
    longest = max(rgb.shape[:2])
    if longest <= side:
        return rgb
    height, width = (max(1, round(length * side / longest)) for length in rgb.shape[:2])
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BOX))


def _thumbnail(image: Any) -> np.ndarray:
    array = _decoded(image)
    if array is None:
        return np.full(3 * SMALL**2, np.nan)
    return np.asarray(Image.fromarray(array).resize((SMALL, SMALL), Image.Resampling.BOX), np.float64).ravel()
