"""WAV files -> waveforms, with everything refused that a codec would swallow and a listener would not."""

from __future__ import annotations

import io
import warnings

import numpy as np
import scipy  # its parts load on first use

from ..errors import DataError
from ..rewards.sound import SILENT, flat_tops

CLIPPED = 1e-3  # share of samples in flat runs at full scale from which on a clip counts as clipped
_ZERO = {"u1": 128}
_SCALE = {"u1": 128.0, "i2": 2.0**15, "i4": 2.0**31}


def read_wav(data: bytes, rate: int) -> np.ndarray:
    """[channels, samples] float32 in [-1, 1]. rate: Hz that is needed; nothing is resampled behind anybody's back.

    Raises DataError: no WAV, another rate, no samples, not a number, silent, or clipped (flat tops at full scale).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)  # of chunks that it does not know
            found, samples = scipy.io.wavfile.read(io.BytesIO(data))
    except Exception as error:  # the reader raises whatever a broken header leads to
        raise DataError(f"not a WAV file that can be read ({type(error).__name__}: {str(error)[:80]})") from None
    if found != rate:
        raise DataError(f"has {found} Hz, and the codec reads {rate} Hz; resample it first (ffmpeg -i IN -ar {rate} OUT)")
    kind = samples.dtype.str[1:]
    if samples.size == 0:
        raise DataError("holds no samples")
    wave = ((samples.astype(np.float64) - _ZERO.get(kind, 0)) / _SCALE.get(kind, 1.0)).astype(np.float32)
    wave = np.ascontiguousarray(np.atleast_2d(wave.T))
    check_wave(wave)
    return wave


def check_wave(wave: np.ndarray) -> None:
    """wave: [channels, samples] in [-1, 1]. Raises DataError for values that are no numbers, silence, and clipping."""
    if not np.isfinite(wave).all():
        raise DataError("holds samples that are no numbers")
    peak = float(np.abs(wave).max())
    if peak < SILENT:
        raise DataError(f"is silent (peak {peak:.1g} of full scale)")
    share = flat_tops(wave)
    if share > CLIPPED:
        raise DataError(f"is clipped ({100 * share:.1f} % of its samples lie in flat tops at full scale); render it lower")


def write_wav(wave: np.ndarray, rate: int) -> bytes:
    """[samples] or [channels, samples] in [-1, 1] -> a WAV file of 16 bits; what lies outside is cut off."""
    file = io.BytesIO()
    scipy.io.wavfile.write(file, rate, np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16).T)
    return file.getvalue()
