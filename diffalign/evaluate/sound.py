"""Clips for the report: spectrograms beside each other, one row a prompt, with players that need nothing but the file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.signal import stft

from ..data.audio import write_wav
from ..sampling.grid import grid
from .statistics import Paired

FLOOR = -60.0  # dB below the loudest point of a spectrogram: black
# (level, red, green, blue), 0 to 1 and 0 to 255: dark is quiet
_COLOURS = ((0, 0, 0, 4), (0.35, 86, 15, 109), (0.65, 229, 92, 48), (0.85, 250, 193, 39), (1, 252, 255, 164))


@dataclass(frozen=True, kw_only=True)
class Sounds:
    """clips: name of a model -> one waveform [samples] for each prompt, at ``rate`` Hz. scores: the reward's, likewise.

    result: of all clips that were compared, of which these are some. reward: its name.
    """

    prompts: Sequence[str]
    clips: dict[str, Sequence[np.ndarray]]
    scores: dict[str, Sequence[float]]
    rate: int
    reward: str
    result: Paired

    @property
    def sentence(self) -> str:
        r = self.result
        return (f"{self.reward}: {r.base_score:.3f} -> {r.aligned_score:.3f} on {r.prompts} held-out prompts ({r.pairs} pairs "
                f"of clips), difference {r.difference:+.3f} [{r.difference_low:+.3f}, {r.difference_high:+.3f}]")

    def picture(self) -> Image.Image:
        """The grid of spectrograms."""
        return grid({name: [spectrogram(wave, self.rate) for wave in waves] for name, waves in self.clips.items()},
                    self.prompts, scores=self.scores, title="Held-out prompts",
                    note=f"Spectrograms, 0 to {self.rate / 2:g} Hz upwards, {-FLOOR:g} dB from yellow to black. "
                         f"{self.sentence}")

    def players(self) -> list[tuple[str, list[tuple[str, Image.Image, str]]]]:
        """(prompt, [(model, spectrogram, data: URI of a WAV file), ...])."""
        return [(prompt, [(name, spectrogram(waves[i], self.rate), _uri(waves[i], self.rate))
                          for name, waves in self.clips.items()]) for i, prompt in enumerate(self.prompts)]


def spectrogram(wave: np.ndarray, rate: int, height: int = 128) -> Image.Image:
    """wave: [samples] -> an RGB picture, time to the right, frequency upwards, level relative to its own loudest point."""
    window = 2 * height
    if len(wave) < window:
        wave = np.pad(wave, (0, window - len(wave)))
    _, _, power = stft(wave, fs=rate, nperseg=window, noverlap=window - max(1, len(wave) // 200))
    level = 20 * np.log10(np.abs(power[:height]) + 1e-12)
    share = np.clip((level - level.max()) / -FLOOR + 1, 0, 1)[::-1]
    at, *colours = zip(*_COLOURS, strict=True)
    return Image.fromarray(np.stack([np.interp(share, at, colour) for colour in colours], -1).astype(np.uint8))


def _uri(wave: np.ndarray, rate: int) -> str:
    return "data:audio/wav;base64," + base64.b64encode(write_wav(wave, rate)).decode()
