"""Rewards that are the cosine of a picture and its prompt under some CLIP: CLIP score, PickScore, HPSv2.

Numbers of different models, versions or scales must not be compared or added; ``identity`` says which they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .preprocess import Preprocess, score_batches
from .towers import ClipSource, Towers, distinct_features
from .weights import local_file


@dataclass(frozen=True, kw_only=True)
class _Cosine:
    """What the three share: f(cosine) of L2-normalised features. Text is cut at the model's length (77 tokens)."""

    batch_size: int = 16
    device: str | None = None
    name: ClassVar[str]
    differentiable: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Scores [N] float32, NaN where a picture cannot be decoded; with gradient to float tensors that ask for it."""
        towers = self._towers
        texts = distinct_features(towers.text, prompts, self.batch_size)

        def score(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
            return self._scaled((towers.image(pictures) * torch.stack([texts[p] for p in prompts])).sum(-1))

        return score_batches(score, self._preprocess, images, prompts, self.batch_size)

    def check(self) -> None:
        """Raises ModelError or ConfigError unless all weights are there. A hub id is downloaded; nothing is loaded."""
        self._source.check()

    def identity(self) -> dict[str, Any]:
        return {**self._source.identity(), "scale": self._scale}

    @cached_property
    def _towers(self) -> Towers:
        return self._source.load(self.device)

    @property
    def _source(self) -> ClipSource:
        raise NotImplementedError

    @property
    def _scale(self) -> str:
        raise NotImplementedError

    @cached_property
    def _preprocess(self) -> Preprocess:
        return Preprocess(size=self._towers.size)

    def _scaled(self, cosine: Tensor) -> Tensor:
        return cosine


@dataclass(frozen=True, kw_only=True)
class ClipScore(_Cosine):
    """Cosine of picture and prompt, in [-1, 1]; ViT-L/14 gives 0.15 to 0.35 (CLIP, arXiv 2103.00020).

    form "clipscore" is 2.5 max(cosine, 0), CLIPScore's own scale (arXiv 2104.08718, equation 1; there with ViT-B/32 and
    the prompt after "A photo depicts", which is left to the caller). model: a transformers folder or hub id, or a
    .safetensors file in open_clip's layout with its ``architecture``; OpenAI's weights need a "-quickgelu" one there.
    """

    model: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    architecture: str | None = None
    form: Literal["cosine", "clipscore"] = "cosine"
    name = "clip"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in ("cosine", "clipscore"):
            raise ValueError(f'form must be "cosine" or "clipscore", got {self.form!r}')

    @cached_property
    def _source(self) -> ClipSource:
        return ClipSource(model=self.model, revision=self.revision, architecture=self.architecture)

    @property
    def _scale(self) -> str:
        return "cosine" if self.form == "cosine" else "2.5 max(cosine, 0)"

    def _scaled(self, cosine: Tensor) -> Tensor:
        return cosine if self.form == "cosine" else 2.5 * cosine.clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class PickScore(_Cosine):
    """exp(logit_scale) * cosine under PickScore v1, 18 to 23 (Pick-a-Pic, arXiv 2305.01569).

    Differences are logits: sigmoid(a - b) is the model's probability that a is preferred. processor: folder or hub id of the
    tokenizer, None where the model's folder has its own. Trained on Pick-a-Pic v1: don't evaluate on its training prompts.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    revision: str | None = None
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    processor_revision: str | None = None
    name = "pickscore"

    @cached_property
    def _source(self) -> ClipSource:
        return ClipSource(model=self.model, revision=self.revision, tokenizer=self.processor,
                          tokenizer_revision=self.processor_revision)

    @cached_property
    def _preprocess(self) -> Preprocess:
        return Preprocess(size=self._towers.size, middle="floor")

    @property
    def _scale(self) -> str:
        return "exp(logit_scale) * cosine"

    def _scaled(self, cosine: Tensor) -> Tensor:
        return self._towers.scale * cosine


@dataclass(frozen=True, kw_only=True)
class HPSv2(_Cosine):
    """Cosine under HPS v2.0 or v2.1, 0.20 to 0.35, without logit scale (arXiv 2306.09341; its tables show 100 times that).

    The two versions are different weights of one network, and their numbers don't compare. model: the published checkpoint
    as .safetensors (docs/rewards.md), or a transformers folder. antialias False: the letterbox as torchvision before 0.17
    made it, with which the published tables were probably computed. The reference forgets to pad a picture whose longest side
    is already 224; here it is padded.
    """

    model: str | None = None
    version: Literal["v2.0", "v2.1"] = "v2.1"
    revision: str | None = None
    architecture: str = "ViT-H-14"
    antialias: bool = True
    name = "hpsv2"

    def __post_init__(self):
        super().__post_init__()
        if self.version not in PUBLISHED:
            raise ValueError(f"version must be one of {', '.join(PUBLISHED)}, got {self.version!r}")

    @cached_property
    def _source(self) -> ClipSource:
        model = self.model or str(local_file(None, "hpsv2: model"))
        named = next((v for v, stem in PUBLISHED.items() if Path(model).stem == stem), self.version)
        if named != self.version:
            raise ConfigError(f"hpsv2: model {model} is named as version {named}, but version is {self.version}")
        return ClipSource(model=model, revision=self.revision, architecture=self.architecture)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "version": self.version, "antialias": self.antialias}

    @cached_property
    def _preprocess(self) -> Preprocess:
        return Preprocess(size=self._towers.size, fit="letterbox", antialias=self.antialias)

    @property
    def _scale(self) -> str:
        return "cosine"


PUBLISHED = {"v2.0": "HPS_v2_compressed", "v2.1": "HPS_v2.1_compressed"}   # version -> the checkpoint's file name
