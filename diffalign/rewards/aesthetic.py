"""LAION's aesthetic predictors: a small head on the picture's CLIP features. The prompt is not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .preprocess import Preprocess, score_batches
from .towers import ClipSource, Towers
from .weights import check_shapes, local_file, on_device, sha256, shapes, tensors

# version -> its linear layers in the published files; what lies between them is dropout and, in v2_relu, a ReLU
LAYERS = {
    "v1": ("",),
    "v2": ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."),
    "v2_relu": ("layers.0.", "layers.3.", "layers.6.", "layers.9.", "layers.11."),
}


@dataclass(frozen=True, kw_only=True)
class Aesthetic:
    """Predicted rating of a picture, about 1 to 10; v1 gives 3 to 7, v2 4 to 7 (LAION-AI/aesthetic-predictor and
    christophschuhmann/improved-aesthetic-predictor).

    Features are the CLIP's, L2-normalised. v1: one linear layer. v2: five linear layers without activations, so an affine
    function; v2_relu: the variant with a ReLU after all but the last. Dropout is for training and absent here.
    head: the published .pth as .safetensors (docs/rewards.md). model: the CLIP it was trained on.
    """

    head: str | None = None
    version: Literal["v1", "v2", "v2_relu"] = "v2"
    model: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    architecture: str | None = None
    batch_size: int = 16
    device: str | None = None
    name: ClassVar[str] = "aesthetic"
    differentiable: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.version not in LAYERS:
            raise ValueError(f"version must be one of {', '.join(LAYERS)}, got {self.version!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Scores [N] float32, NaN where a picture cannot be decoded; with gradient to float tensors that ask for it."""
        preprocess = Preprocess(size=self._towers.size)
        return score_batches(lambda x, _: self.rate(self._towers.image(x)), preprocess, images, prompts, self.batch_size)

    def rate(self, features: Tensor) -> Tensor:
        """L2-normalised features [B, D] -> ratings [B]."""
        for depth, (weight, bias) in enumerate(self._layers):
            if depth and self.version == "v2_relu":
                features = F.relu(features)
            features = F.linear(features, weight, bias)
        return features.squeeze(-1)

    def check(self) -> None:
        """Raises ModelError or ConfigError unless head and CLIP are there and fit together. Nothing is loaded."""
        file, found = self._file, shapes([self._file])
        self._source.check()
        width = self._source.width
        first = found.get(LAYERS[self.version][0] + "weight", (1, width))
        if first[-1] != width:
            raise ModelError(f"{file}: the head reads features of {first[-1]} numbers, but {self.model} gives {width}; it was "
                             "trained on another CLIP")
        check_shapes(found, self._wanted(found, width), f"{file} (version {self.version})")

    def identity(self) -> dict[str, Any]:
        return {**self._source.identity(), "head": self.head, "head_sha256": sha256([self._file]), "version": self.version,
                "scale": "rating"}

    def _wanted(self, found: dict[str, tuple], width: int) -> dict[str, tuple]:
        """Each layer reads what the one before gives; the last gives one number."""
        wanted = {}
        names = LAYERS[self.version]
        for name in names:
            out = 1 if name == names[-1] else found.get(name + "weight", (1,))[0]
            wanted |= {name + "weight": (out, width), name + "bias": (out,)}
            width = out
        return wanted

    @cached_property
    def _file(self) -> Path:
        return local_file(self.head, "aesthetic: head")

    @cached_property
    def _source(self) -> ClipSource:
        return ClipSource(model=self.model, revision=self.revision, architecture=self.architecture)

    @cached_property
    def _towers(self) -> Towers:
        self.check()
        return self._source.load(self.device)

    @cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        head, device = tensors(self._file), on_device(self.device)
        return [(head[name + "weight"].to(device), head[name + "bias"].to(device)) for name in LAYERS[self.version]]
