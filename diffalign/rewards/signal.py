"""Whether a clip is clean as a signal. No ear and no network: it knows nothing of music."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ..types import Sound
from .sound import SILENT, flat_tops, flatness, frames, score_each_clip

CLIPPED, OFFSET = 0.05, 0.5  # share of samples in flat tops, and mean over root mean square, that cost a whole fault
NOISE = 0.56  # spectral flatness of white noise


@dataclass(frozen=True, kw_only=True)
class Signal:
    """1 for a clean signal, less for each of four faults, 0 for silence; NaN for a clip that is empty or not finite.

    A quarter each, in proportion to: samples in flat tops at full scale (all of it at 5 %); a constant offset (at half of the
    root mean square); the longest silence (the whole clip); noise, by the spectral flatness of what sounds (white noise). The
    prompt is not read. It finds broken clips, and prefers a sine to any music: report it beside a judge (``rewards``), don't
    optimise it.
    """

    name: ClassVar[str] = "signal"
    subject: ClassVar[str] = "clips"
    differentiable: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    def __call__(self, clips: Sequence[Sound], prompts: Sequence[str]) -> Tensor:
        return score_each_clip(lambda clip, _: 1 - sum(faults(clip).values()) / 4, clips, prompts)


def faults(clip: Sound) -> dict[str, float]:
    """Each 0 (none) to 1."""
    wave = np.asarray(clip.wave, np.float64)
    if np.abs(wave).max() < SILENT:
        return dict.fromkeys(("clipping", "offset", "silence", "noise"), 1.0)
    mono = wave.mean(0)
    offset = np.abs(wave.mean(1)) / np.sqrt((wave**2).mean(1)).clip(SILENT)
    flat = flatness(mono, clip.rate)
    return {"clipping": min(1.0, flat_tops(wave) / CLIPPED), "offset": min(1.0, float(offset.max()) / OFFSET),
            "silence": longest_silence(mono, clip.rate), "noise": 0.0 if np.isnan(flat) else min(1.0, flat / NOISE)}


def longest_silence(wave: np.ndarray, rate: int) -> float:
    """Share of the clip that its longest silence takes, in frames of 20 ms."""
    quiet = np.abs(frames(wave, rate)).max(1) < SILENT
    edges = np.flatnonzero(np.diff(quiet.astype(int), prepend=0, append=0))
    return float((edges[1::2] - edges[::2]).max(initial=0) / len(quiet))
