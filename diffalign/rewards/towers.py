"""CLIP's two towers behind one face, whether they lie in transformers' layout or in open_clip's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..models.folder import read_json
from ..models.load import loading
from .weights import check_shapes, folder_weights, local_file, model_folder, on_device, prefix_before, sha256, shapes, tensors

FILES = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")
OPEN_CLIP_ANCHOR = "visual.class_embedding"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Towers:
    """A loaded CLIP, eval and frozen. Features are [B, D], L2-normalised.

    image: [B, 3, size, size] normalised pictures -> features, with gradient to the pictures. text: texts -> features.
    scale: exp(logit_scale), about 100.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Sequence[str]], Tensor]
    scale: float
    size: int


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Which CLIP: a transformers folder, a hub id (at ``revision``), or a .safetensors file in open_clip's layout.

    architecture: open_clip's name for the file's network. tokenizer, tokenizer_revision: a folder or hub id with the
    tokenizer of a transformers model; None: the model's own. Errors are ModelError and ConfigError, one line.
    """

    model: str
    revision: str | None = None
    architecture: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None

    @property
    def is_file(self) -> bool:
        return Path(self.model).suffix == ".safetensors"

    @cached_property
    def folder(self) -> Path:
        """The model's folder; a hub id is downloaded, once."""
        return model_folder(self.model, self.revision, FILES if self.tokenizer else FILES + TOKENIZER)

    @cached_property
    def tokenizer_folder(self) -> Path:
        return model_folder(self.tokenizer, self.tokenizer_revision, TOKENIZER) if self.tokenizer else self.folder

    @cached_property
    def files(self) -> list[Path]:
        """The weights: one file, or the shards of a folder."""
        return [local_file(self.model, "model")] if self.is_file else folder_weights(self.folder, self.model)

    def check(self) -> None:
        """Every tensor of both towers is there and has its shape; no weights are read, a hub id is downloaded."""
        if self.is_file:
            found = shapes(self.files)
            prefix = prefix_before(found, OPEN_CLIP_ANCHOR, self.model)
            found = {name.removeprefix(prefix): shape for name, shape in found.items()}
            wanted = _open_clip_model(self.architecture, "meta").state_dict()
        else:
            found, wanted = shapes(self.files), empty_clip(self.folder).state_dict()
            check_tokenizer(self.tokenizer_folder)
        check_shapes(found, {name: tuple(value.shape) for name, value in wanted.items()}, self.model)

    def load(self, device: str | None, dtype: torch.dtype = torch.float32) -> Towers:
        """The towers on ``device`` (None: CUDA where there is one)."""
        self.check()
        return (self._load_open_clip if self.is_file else self._load_transformers)(on_device(device), dtype)

    @property
    def width(self) -> int:
        """Numbers in a feature, from the header of the weights."""
        found = shapes(self.files)
        if self.is_file:
            return found[prefix_before(found, "visual.proj", self.model) + "visual.proj"][1]
        return found["visual_projection.weight"][0]

    def identity(self) -> dict[str, Any]:
        """JSON-ready: what was asked for, and the hash of the weights."""
        return {"model": self.model, "revision": self.revision, "sha256": sha256(self.files),
                **({"architecture": self.architecture} if self.is_file else {})}

    def _load_transformers(self, device: torch.device, dtype: torch.dtype) -> Towers:
        from transformers import CLIPModel

        with loading(self.model):
            model = CLIPModel.from_pretrained(self.folder, use_safetensors=True, local_files_only=True)
            tokenize = clip_tokenizer(self.tokenizer_folder, model.config.text_config.max_position_embeddings)
        model = model.to(device, dtype).eval().requires_grad_(False)
        return Towers(image=lambda x: F.normalize(pooled(model.get_image_features(x.to(device, dtype))), dim=-1),
                      text=lambda texts: F.normalize(pooled(model.get_text_features(tokenize(texts).to(device))), dim=-1),
                      scale=model.logit_scale.exp().item(), size=model.config.vision_config.image_size)

    def _load_open_clip(self, device: torch.device, dtype: torch.dtype) -> Towers:
        prefix = prefix_before(shapes(self.files), OPEN_CLIP_ANCHOR, self.model)
        model = _open_clip_model(self.architecture, "cpu")
        names = model.state_dict().keys()
        with loading(self.model):
            model.load_state_dict({k: v for k, v in tensors(self.files[0], prefix).items() if k in names})
        model = model.to(device, dtype).eval().requires_grad_(False)
        tokenize = _open_clip().get_tokenizer(self.architecture)
        size = model.visual.image_size
        return Towers(image=lambda x: model.encode_image(x.to(device, dtype), normalize=True),
                      text=lambda texts: model.encode_text(tokenize(list(texts)).to(device), normalize=True),
                      scale=model.logit_scale.exp().item(), size=size if isinstance(size, int) else size[0])


def distinct_features(encode: Callable[[Sequence[str]], Iterable[T]], prompts: Sequence[str], batch_size: int) -> dict[str, T]:
    """prompt -> what ``encode`` gives for it (B texts -> B rows); each distinct prompt is encoded once."""
    texts = list(dict.fromkeys(prompts))
    with torch.no_grad():
        rows = [row for i in range(0, len(texts), batch_size) for row in encode(texts[i : i + batch_size])]
    return dict(zip(texts, rows, strict=True))


def clip_tokenizer(folder: Path, length: int) -> Callable[[Sequence[str]], Tensor]:
    """texts -> token ids [B, length]: longer texts are cut, as in the reference, shorter ones padded to the same length."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda texts: tokenizer(list(texts), padding="max_length", truncation=True, max_length=length,
                                   return_tensors="pt").input_ids


def check_tokenizer(folder: Path) -> None:
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: holds no tokenizer (vocab.json and merges.txt, or tokenizer.json)")


def empty_clip(folder: Path) -> Any:
    """transformers' CLIPModel of a folder's config.json, without memory for its weights."""
    from transformers import CLIPConfig, CLIPModel

    config = read_json(folder / "config.json", str(folder))
    if config.get("model_type") != "clip":
        raise ModelError(f"{folder}: config.json says model_type {config.get('model_type')!r}, this reward needs 'clip'")
    with loading(folder / "config.json"), torch.device("meta"):
        return CLIPModel(CLIPConfig.from_dict(config))


def pooled(features: Any) -> Tensor:
    """[B, D]; transformers 5 wraps it in an output object."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _open_clip_model(architecture: str | None, device: str) -> Any:
    open_clip = _open_clip()
    config = open_clip.get_model_config(architecture) if architecture else None
    if config is None:
        raise ConfigError(f"architecture is {architecture!r}, which open_clip does not know; a .safetensors file needs its "
                          "open_clip name, such as ViT-H-14 (open_clip.list_models())")
    try:
        with torch.device(device):
            return open_clip.CLIP(**config)
    except TypeError as error:   # a custom text tower, captioning and the like
        raise ConfigError(f"architecture {architecture} is not a plain CLIP of open_clip ({error})") from error


def _open_clip() -> Any:
    from .. import _compat  # noqa: F401

    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f'a file in open_clip\'s layout needs open_clip: pip install "diffalign[clip]" ({error})') from error
    return open_clip
