"""What the families of sound have in common: which clips a model reads, and what it is told beside the latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from ..errors import DataError
from .base import Adapter
from .lora import write_peft

if TYPE_CHECKING:
    from .encoders import Encoders

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Clips:
    """rate: Hz. channels: of the waveforms that are encoded. longest: samples. step: a clip is filled up with silence to the
    next multiple of so many samples; ``longest`` itself where all latents are of one length.
    """

    rate: int
    channels: int
    longest: int
    step: int

    def padded(self, samples: int) -> int:
        return -(-samples // self.step) * self.step


class SoundAdapter(Adapter):
    """A family of sound writes ``clips`` and ``told`` in place of ``encode`` and ``unconditional``, and ``posterior``,
    ``beside`` and ``timing`` if they are not as here. Arrays of ``told`` may differ in their first axis: a batch fills them up
    with zeros.
    """

    audio = True
    pooled_is_projected = False
    seconds: ClassVar[str]                  # what the pipeline calls the length of a clip
    notes: ClassVar[dict[str, type]] = {}   # columns of a row that the pipeline reads beside the caption: str or int

    @staticmethod
    def clips(pipe) -> Clips:
        raise NotImplementedError

    @staticmethod
    def posterior(encoders: Encoders, wave: Tensor) -> tuple[Tensor, Tensor]:
        """wave: [1, channels, samples], of a padded length -> mean and std of the latents, [1, *S] each."""
        return encoders.encode_images(wave)

    @staticmethod
    def told(encoders: Encoders, caption: str, notes: Mapping[str, Any], samples: int) -> tuple[np.ndarray, Arrays]:
        """-> ``Cond.tokens`` [L, D] and ``Cond.extra`` of a caption and its clips, which have ``samples`` samples after
        padding. notes: by the names in ``notes``. Raises DataError for a text that the pipeline would cut.
        """
        raise NotImplementedError

    @staticmethod
    def beside(encoders: Encoders, samples: int) -> Arrays:
        """What stands beside latents of this length, whatever the caption: held once for all of them."""
        return {}

    @staticmethod
    def timing(encoders: Encoders, samples: int) -> Arrays:
        """What the model is told of one clip of so many samples before padding."""
        return {}

    def save_lora(self, folder: Path | str, metadata: dict[str, str]) -> None:
        """As ``PeftModel.from_pretrained(pipe.unet, folder)`` (or ``pipe.transformer``) reads it: no pipeline loads it."""
        write_peft(self, folder, metadata)


def counted(tokenizer, text: str, longest: int, what: str) -> None:
    """Raises DataError for a text with more tokens than ``longest``."""
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if count > longest:
        raise DataError(f"{what} has {count} tokens, and the model's text encoder reads {longest}; shorten it")


def array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
