"""The embedded clips: captions, their synthesis, and the checker that finds tempo, pitch and instrument again by analysis.

A caption is "a TEMPO INSTRUMENT playing PITCH": one note repeated. A clip has 1.28 s at 4 kHz. Every pitch is a multiple of
50 Hz, so that a codec frame of 20 ms holds whole cycles and a held note looks the same in each frame: this lets a codec and a
language model of a few minutes' training do it. The checker is an exact reward: it reads the waveform alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

RATE, SAMPLES, FRAME = 4000, 5120, 80  # Hz, samples of a clip, samples of a codec frame
TEMPI = {"slow": 2, "medium": 4, "fast": 8}  # notes a clip
PITCHES = {"b": 250, "d": 300, "f": 350, "g": 400, "a": 450, "c": 500}  # Hz
INSTRUMENTS = {"flute": (1.0, 0.0, 0.0), "clarinet": (1.0, 0.0, 0.9), "violin": (1.0, 0.8, 0.4)}  # amplitudes of harmonics
SILENT = 1e-3  # a peak below it (-60 dB of full scale) is silence
_HELD = 0.6  # share of a note's time that sounds
_NEAR = 12.5  # Hz around a pitch that still count as it
_ALIKE = 0.35  # largest distance of (second, third harmonic) from an instrument's


@dataclass(frozen=True, kw_only=True)
class Clip:
    tempo: str
    pitch: str
    instrument: str

    @property
    def caption(self) -> str:
        return f"a {self.tempo} {self.instrument} playing {self.pitch}"


def every_clip() -> list[Clip]:
    """All 54, in a fixed order."""
    return [Clip(tempo=t, pitch=p, instrument=i) for t, p, i in itertools.product(TEMPI, PITCHES, INSTRUMENTS)]


def part_of(clip: Clip) -> str:
    """"train" (27 clips: preferences are of these), "validation" (9: settings are chosen on these) or "heldout" (18: measured,
    never chosen by). Each holds every two of tempo and instrument equally often, and "heldout" every pitch, too.
    """
    tempo, pitch, instrument = (list(names).index(name) for names, name in
                                ((TEMPI, clip.tempo), (PITCHES, clip.pitch), (INSTRUMENTS, clip.instrument)))
    return {0: "heldout", 1: "validation", 3: "heldout"}.get((tempo + pitch + instrument) % 6, "train")


def read_caption(caption: str) -> Clip | None:
    words = caption.split()
    return next((clip for clip in every_clip() if clip.caption.split() == words), None)


def synthesise(clip: Clip, volume: float = 0.8) -> np.ndarray:
    """[SAMPLES] float32, peaks at most ``volume``."""
    time = np.arange(SAMPLES) / RATE
    tone = sum(a * np.sin(2 * np.pi * PITCHES[clip.pitch] * (n + 1) * time)
               for n, a in enumerate(INSTRUMENTS[clip.instrument]))
    period = SAMPLES // TEMPI[clip.tempo]
    place, ramp = np.arange(SAMPLES) % period, FRAME / 2
    held = np.ceil(_HELD * period / FRAME) * FRAME
    envelope = np.clip(np.minimum(place / ramp, (held - place) / ramp), 0, 1)
    return (volume * envelope * tone / np.abs(tone).max()).astype(np.float32)


def heard(wave: np.ndarray) -> tuple[str | None, str | None, str | None]:
    """(tempo, pitch, instrument) of a waveform [samples] at 4 kHz; None for what is none of them. Silence is nothing."""
    wave = np.asarray(wave, np.float64)
    if wave.ndim != 1 or len(wave) < SAMPLES // 2 or not np.isfinite(wave).all() or np.abs(wave).max() < SILENT:
        return None, None, None
    harmonics = _harmonics(wave)
    tempo = next((name for name, notes in TEMPI.items() if notes == _onsets(wave)), None)
    if harmonics is None:
        return tempo, None, None
    frequency, ratios = harmonics
    pitch = next((name for name, hertz in PITCHES.items() if abs(hertz - frequency) < _NEAR), None)
    distance = {name: np.hypot(ratios[0] - a[1], ratios[1] - a[2]) for name, a in INSTRUMENTS.items()}
    instrument = min(distance, key=distance.get)
    return tempo, pitch, instrument if distance[instrument] < _ALIKE else None


def _onsets(wave: np.ndarray) -> int:
    """How often the level rises above half of its maximum after it was below a quarter."""
    level = np.sqrt((wave[:len(wave) // FRAME * FRAME].reshape(-1, FRAME) ** 2).mean(1))
    count, quiet = 0, True
    for value in level / level.max():
        if quiet and value > 0.5:
            count, quiet = count + 1, False
        quiet = quiet or value < 0.25
    return count


def _harmonics(wave: np.ndarray) -> tuple[float, tuple[float, float]] | None:
    """The lowest strong frequency in Hz, and the second and third harmonic's amplitudes as shares of its own."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)

    def amplitude(frequency: float) -> float:
        return float(np.sqrt(power[np.abs(hertz - frequency) < 2 * _NEAR].sum()))

    above = hertz > 100
    strong = above & (power > 0.2 * power[above].max())
    first = hertz[np.argmax(strong)]
    near = np.abs(hertz - first) < 2 * _NEAR
    frequency = float(hertz[near][power[near].argmax()])
    base = amplitude(frequency)
    return (frequency, (amplitude(2 * frequency) / base, amplitude(3 * frequency) / base)) if base > 0 else None


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Share of a caption's three attributes that are heard in the clip: 0, 1/3, 2/3 or 1. NaN for a caption of another kind.

    clips: N waveforms [samples] at 4 kHz.
    """

    name: ClassVar[str] = "clips"
    differentiable: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    def __call__(self, clips: Sequence[Tensor | np.ndarray], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([_share(np.asarray(clip), prompt) for clip, prompt in zip(clips, prompts, strict=True)])


def _share(wave: np.ndarray, prompt: str) -> float:
    wanted = read_caption(prompt)
    if wanted is None:
        return float("nan")
    right = [a == b for a, b in zip(heard(wave), (wanted.tempo, wanted.pitch, wanted.instrument), strict=True)]
    return sum(right) / 3
