"""Clips for a comparison: what they sound like in cheap numbers, how far they lie apart, their spectrograms and players."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.audio import write_wav
from ..rewards.sound import SILENT, flat_tops, flatness, frames
from ..types import Sound
from .looks import Look

FLOOR = -60.0  # dB below the loudest point of a spectrogram: black
QUIET = -100.0  # dB of full scale: what silence counts as
EXCERPT = 10.0  # seconds that a player in a page holds
SMALL = 32  # bands and moments at which clips are compared with each other
# (level, red, green, blue), 0 to 1 and 0 to 255: dark is quiet
_COLOURS = ((0, 0, 0, 4), (0.35, 86, 15, 109), (0.65, 229, 92, 48), (0.85, 250, 193, 39), (1, 252, 255, 164))


def level(clip: Sound) -> float:
    """Root mean square in dB of full scale."""
    return max(QUIET, float(10 * np.log10((clip.wave.astype(np.float64) ** 2).mean() + 1e-20)))


def peak_factor(clip: Sound) -> float:
    """Peak over root mean square, dB: small where everything is equally loud. 0 for silence."""
    peak = float(np.abs(clip.wave).max())
    return 0.0 if peak < SILENT else 20 * float(np.log10(peak)) - level(clip)


def silence(clip: Sound) -> float:
    """Share of frames of 20 ms below -60 dB of full scale."""
    return float((np.abs(frames(clip.wave.mean(0), clip.rate)).max(1) < SILENT).mean())


def centroid(clip: Sound) -> float:
    """Mean frequency by power, as a share of half the rate: dull to shrill."""
    power = np.abs(np.fft.rfft(clip.wave.astype(np.float64).mean(0))) ** 2
    return float(power @ np.linspace(0, 1, len(power)) / max(power.sum(), 1e-20))


def noise(clip: Sound) -> float:
    """Spectral flatness (``rewards.sound``); 0 for silence."""
    return float(np.nan_to_num(flatness(clip.wave.astype(np.float64).mean(0), clip.rate)))


HEARD: dict[str, Look] = {
    "level": Look(measure=level, unit="dB of full scale", least=0.5),
    "peak factor": Look(measure=peak_factor, unit="dB", least=0.5),
    "clipping": Look(measure=lambda clip: flat_tops(clip.wave), unit="share of samples", least=0.005),
    "silence": Look(measure=silence, unit="share of 20 ms frames", least=0.02),
    "spectral centroid": Look(measure=centroid, unit="share of half the rate", least=0.01),
    "spectral flatness": Look(measure=noise, unit="0 to 1", least=0.02),
}


def heard(clips: Sequence[Sound]) -> np.ndarray:
    """N clips -> [statistics, N] float64, in the order of ``HEARD``."""
    return np.array([[look.measure(clip) for clip in clips] for look in HEARD.values()], np.float64)


def contours(clips: Sequence[Sound]) -> np.ndarray:
    """[N, SMALL * SMALL] float64: spectrograms in dB of full scale, brought to SMALL bands and moments; for ``spread``."""
    return np.stack([np.asarray(Image.fromarray(np.maximum(_levels(clip, 4 * SMALL), QUIET).astype(np.float32))
                                .resize((SMALL, SMALL), Image.Resampling.BOX), np.float64).ravel() for clip in clips])


def spectrogram(clip: Sound, height: int = 128) -> Image.Image:
    """An RGB picture, time to the right, frequency upwards to half the rate, level relative to its own loudest point."""
    levels = _levels(clip, height)
    share = np.clip((levels - levels.max()) / -FLOOR + 1, 0, 1)[::-1]
    if levels.max() <= QUIET:  # silence has no loudest point
        share = np.zeros_like(share)
    at, *colours = zip(*_COLOURS, strict=True)
    return Image.fromarray(np.stack([np.interp(share, at, colour) for colour in colours], -1).astype(np.uint8))


def _levels(clip: Sound, height: int) -> np.ndarray:
    """[height, about 200] dB of full scale, the lowest frequency first; channels are averaged."""
    from scipy.signal import stft  # slow to import

    wave = clip.wave.astype(np.float64).mean(0)
    window = 2 * height * max(1, -(-len(wave) // (400 * height)))  # a hop longer than the window would leave samples out
    if len(wave) < window:
        wave = np.pad(wave, (0, window - len(wave)))
    _, _, spectrum = stft(wave, fs=clip.rate, nperseg=window, noverlap=window - max(1, len(wave) // 200))
    power = np.abs(spectrum[:-1]) ** 2  # without half the rate itself
    return 10 * np.log10(power.reshape(height, -1, power.shape[1]).mean(1) + 1e-14)


def player(clip: Sound) -> str:
    """A data: URI of a WAV file: the first ``EXCERPT`` seconds, channels averaged."""
    wave = clip.wave[:, :round(EXCERPT * clip.rate)].mean(0)
    return "data:audio/wav;base64," + base64.b64encode(write_wav(wave, clip.rate)).decode()
