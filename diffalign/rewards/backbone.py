"""A CLIP whose features a trained head reads: picture and text, L2-normalised, with some layers replaced by trained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..models.load import loading
from .preprocess import Preprocess
from .step_aware import TimeConditioning
from .towers import ClipSource, clip_tokenizer, pooled


class Backbone(nn.Module):
    """A transformers CLIPModel in float32 and its tokenizer; features are [N, width] of length 1. time: if step-aware."""

    def __init__(self, model: nn.Module, folder: Path, time: TimeConditioning | None = None):
        super().__init__()
        self.clip, self.time = model, time
        self.tokenize = clip_tokenizer(folder, model.config.text_config.max_position_embeddings)
        self.preprocess = Preprocess(size=model.config.vision_config.image_size)

    @property
    def width(self) -> int:
        return self.clip.config.projection_dim

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def images(self, pictures: Tensor, t: Tensor | None = None) -> Tensor:
        """[N, 3, S, S] as ``preprocess`` gives them -> [N, width], with gradient to the pictures. t: [N] noise levels, of a
        step-aware one."""
        pictures = pictures.to(self.device)
        if self.time is not None:
            return F.normalize(self.time.pooled(self.clip, pictures, t.to(self.device)).float(), dim=-1)
        return F.normalize(pooled(self.clip.get_image_features(pixel_values=pictures)).float(), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """N texts, cut at the model's length -> [N, width]."""
        return F.normalize(pooled(self.clip.get_text_features(self.tokenize(prompts).to(self.device))).float(), dim=-1)


def load_backbone(source: ClipSource, device: torch.device, changed: Mapping[str, Tensor] | None = None, *,
                  step_aware: bool = False) -> Backbone:
    """Frozen, in eval mode. changed: tensors by the CLIPModel's names that replace its own. step_aware: with the start of a
    time conditioning, which changes nothing yet. Raises ModelError."""
    from transformers import CLIPModel
    from transformers.utils import logging

    source.check()
    with loading(source.model):
        before = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = CLIPModel.from_pretrained(source.folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        finally:
            if before:
                logging.enable_progress_bar()
        backbone = Backbone(model, source.tokenizer_folder, TimeConditioning.of(model) if step_aware else None)
    _replace(model, changed or {}, source.model)
    return backbone.to(device).eval().requires_grad_(False)


def check_backbone(source: ClipSource) -> None:
    """Raises ModelError unless it is a transformers CLIP with all its weights; a hub id is downloaded, nothing is loaded."""
    if source.is_file:
        raise ModelError(f"{source.model}: a head is trained on a CLIP in transformers' layout, a folder or a hub id")
    source.check()


def _replace(model: nn.Module, changed: Mapping[str, Tensor], where: Any) -> None:
    own = model.state_dict()
    for name, tensor in changed.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ModelError(f"{where}: has no layer {name} of shape {list(tensor.shape)}, which the trained reward replaces; "
                             "it is not the backbone that the reward was trained on")
    model.load_state_dict(dict(changed), strict=False)
