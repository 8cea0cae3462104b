"""What the compared models make: how it is measured for the alarm, told apart, sent between processes and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..types import Sound
from .looks import LOOKS, Look, looks, spread
from .sound import HEARD, contours, heard, spectrogram


@dataclass(frozen=True, kw_only=True)
class Medium:
    """noun: in the plural. looks: statistics of one sample by name. measure: N samples -> [statistics, N]. spread: (samples,
    per prompt) -> [P], the mean distance inside a prompt. pack, unpack: a sample as an array, and back. picture: as it is
    shown. audible: whether it is played as well.
    """

    noun: str
    looks: Mapping[str, Look]
    measure: Callable[[Sequence[Any]], np.ndarray]
    spread: Callable[[Sequence[Any], int], np.ndarray]
    pack: Callable[[Any], np.ndarray]
    unpack: Callable[[np.ndarray], Any]
    picture: Callable[[Any], Image.Image]
    audible: bool = False


def _packed(clip: Sound) -> np.ndarray:
    """[channels, 1 + samples] float32, the rate first: exact, as every whole number below 2^24 is."""
    return np.concatenate([np.full((len(clip.wave), 1), clip.rate, np.float32), clip.wave], 1)


PICTURES = Medium(noun="pictures", looks=LOOKS, measure=looks, spread=spread,
                  pack=lambda image: np.asarray(image.convert("RGB")), unpack=Image.fromarray, picture=lambda image: image)
CLIPS = Medium(noun="clips", looks=HEARD, measure=heard, spread=partial(spread, features=contours), pack=_packed,
               unpack=lambda array: Sound(wave=array[:, 1:], rate=int(array[0, 0])), picture=spectrogram, audible=True)
