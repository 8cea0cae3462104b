"""Text adherence of clips: the cosine of a clip and its prompt under a CLAP of transformers (arXiv 2211.06687).

MusicRL's reward is the mean of such cosines, by MuLan, over three segments of ten seconds (arXiv 2402.04229, section 3.2.1).
Never evaluate with the CLAP that gave the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..models.load import loading
from ..types import Sound
from .sound import score_each_clip, waveform
from .towers import pooled
from .weights import folder_weights, model_folder, on_device, sha256

FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json",
         "vocab.json", "merges.txt")


@dataclass(frozen=True, kw_only=True)
class Clap:
    """clips: N ``Sound``s -> cosines [N] in [-1, 1]; NaN for a clip that is empty or not finite.

    Channels are averaged, clips resampled to the model's own rate (48 kHz) and cut into windows of its length (10 s), whose
    cosines are averaged. pretrained_model_name_or_path: a folder or hub id with safetensors, such as laion/larger_clap_music.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    device: str | None = None
    name: ClassVar[str] = "clap"
    subject: ClassVar[str] = "clips"
    differentiable: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def __call__(self, clips: Sequence[Sound], prompts: Sequence[str]) -> Tensor:
        return score_each_clip(self._one, clips, prompts)

    def check(self) -> None:
        """Raises ModelError unless the weights are there; a hub id is downloaded, nothing is loaded."""
        folder_weights(self._folder, self.pretrained_model_name_or_path)

    def identity(self) -> dict[str, Any]:
        files = folder_weights(self._folder, self.pretrained_model_name_or_path)
        return {"model": self.pretrained_model_name_or_path, "revision": self.revision, "weights": sha256(files)}

    def _one(self, clip: Sound, prompt: str) -> float:
        model, features, tokenizer = self._parts
        longest = model.config.text_config.max_position_embeddings - 2  # RoBERTa counts positions from 2
        words = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=longest)
        text = pooled(model.get_text_features(**words.to(model.device)))
        windows = segments(waveform(clip, features.sampling_rate), features.nb_max_samples)
        heard = features(windows, sampling_rate=features.sampling_rate, return_tensors="pt").to(model.device)
        sound = pooled(model.get_audio_features(**heard))
        return float((sound @ text.T).mean())  # both have length 1

    @cached_property
    def _folder(self):
        return model_folder(self.pretrained_model_name_or_path, self.revision, FILES)

    @cached_property
    def _parts(self) -> tuple:
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        self.check()
        with loading(self.pretrained_model_name_or_path):
            model = ClapModel.from_pretrained(self._folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
            return (model.to(on_device(self.device)).eval().requires_grad_(False),
                    ClapFeatureExtractor.from_pretrained(self._folder, local_files_only=True),
                    AutoTokenizer.from_pretrained(self._folder, local_files_only=True))


def segments(wave: np.ndarray, length: int) -> list[np.ndarray]:
    """Windows of ``length`` samples, as many as fit when rounded, spread evenly from the start to the end; a shorter clip is
    one window.
    """
    count = max(1, round(len(wave) / length))
    last = max(0, len(wave) - length)
    starts = [round(last * i / (count - 1)) for i in range(count)] if count > 1 else [0]
    return [wave[start:start + length] for start in starts]
