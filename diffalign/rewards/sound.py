"""The one place where clips are converted and looked at for rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..types import Sound

SILENT = 1e-3  # a peak below it (-60 dB of full scale) is silence
_FULL, _RUN = 0.999, 3  # a single sample at full scale is a peak; this many in a row are a flat top


def waveform(clip: Sound, rate: int) -> np.ndarray:
    """One clip -> [samples] float64 at ``rate`` Hz: channels are averaged, another rate is resampled."""
    return resampled(np.asarray(clip.wave, np.float64).mean(0), clip.rate, rate)


def resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """[samples] at ``rate`` Hz -> at ``wanted`` Hz, by a polyphase filter."""
    if rate == wanted or not wave.size:
        return wave
    from scipy.signal import resample_poly  # slow to import

    shared = math.gcd(rate, wanted)
    return resample_poly(wave, wanted // shared, rate // shared)


def score_each_clip(one: Callable[[Sound, str], float], clips: Sequence[Sound], prompts: Sequence[str]) -> Tensor:
    """[N] float32: ``one(clip, prompt)`` of each; NaN where a clip is empty or not finite."""
    if len(clips) != len(prompts):
        raise ValueError(f"{len(clips)} clips for {len(prompts)} prompts: pass one prompt per clip")
    wrong = next((type(clip).__name__ for clip in clips if not isinstance(clip, Sound)), None)
    if wrong is not None:
        raise TypeError(f"a clip is a diffalign.types.Sound, which knows its sample rate; not a {wrong}")
    return torch.tensor([one(clip, prompt) if clip.wave.size and np.isfinite(clip.wave).all() else math.nan
                         for clip, prompt in zip(clips, prompts, strict=True)], dtype=torch.float32)


def flat_tops(wave: np.ndarray) -> float:
    """wave: [channels, samples] -> share of samples that belong to runs of three or more at full scale, of one sign."""
    wave = np.pad(wave, ((0, 0), (0, 1))).reshape(-1)  # a zero between the channels
    full = np.sign(wave) * (np.abs(wave) >= _FULL)
    edges = np.flatnonzero(np.diff(full, prepend=np.nan, append=np.nan) != 0)
    runs = np.diff(edges)
    return float(runs[(full[edges[:-1]] != 0) & (runs >= _RUN)].sum() / len(wave))


def frames(wave: np.ndarray, rate: int, seconds: float = 0.02) -> np.ndarray:
    """[samples] -> [n, length], windows of ``seconds`` side by side; a rest at the end is left out, a short clip is one."""
    length = min(len(wave), max(1, round(rate * seconds)))
    return wave[:len(wave) // length * length].reshape(-1, length)


def flatness(wave: np.ndarray, rate: int) -> float:
    """Geometric over arithmetic mean of the power spectrum, averaged over the frames that sound: 0 a tone, about 0.56 white
    noise (the expected value for exponentially distributed powers, exp(-0.577)); NaN where none sounds.
    """
    parts = frames(wave, rate, 0.04)
    parts = parts[np.abs(parts).max(1) >= SILENT]
    if not len(parts) or parts.shape[1] < 8:
        return math.nan
    power = np.abs(np.fft.rfft(parts * np.hanning(parts.shape[1]), axis=1))[:, 1:] ** 2 + 1e-20
    return float((np.exp(np.log(power).mean(1)) / power.mean(1)).mean())
