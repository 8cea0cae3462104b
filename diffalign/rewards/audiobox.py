"""Quality of clips as listeners rate it: Audiobox Aesthetics (arXiv 2502.05139), a WavLM with four heads, in transformers' own
``WavLMModel``. Weights: facebook/audiobox-aesthetics (CC BY 4.0), safetensors; nothing of the authors' package is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.folder import read_json
from ..models.load import loading
from ..types import Sound
from .sound import score_each_clip, waveform
from .weights import check_shapes, folder_weights, model_folder, on_device, sha256, shapes, tensors

FILES = ("config.json", "model.safetensors")
RATE, WINDOW = 16_000, 10  # Hz, and seconds of a window
HOP, FIELD = 320, 400  # samples from frame to frame of WavLM, and under one frame
ENCODER = "wavlm_model."
_STRIDES = (5, 2, 2, 2, 2, 2, 2)
# the authors' names (those of WavLM's first release) -> transformers'
_NAMES = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.+)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.0\.2\.(.+)", r"feature_extractor.conv_layers.0.layer_norm.\1"),
    (r"post_extract_proj\.(.+)", r"feature_projection.projection.\1"),
    (r"layer_norm\.(.+)", r"feature_projection.layer_norm.\1"),
    (r"mask_emb", "masked_spec_embed"),
    (r"encoder\.pos_conv\.0\.bias", "encoder.pos_conv_embed.conv.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a", r"encoder.layers.\1.attention.gru_rel_pos_const"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.(.+)", r"encoder.layers.\1.attention.gru_rel_pos_linear.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.(.+)", r"encoder.layers.\1.attention.rel_attn_embed.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"encoder.layers.\1.attention.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"encoder.layers.\1.layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(.+)", r"encoder.layers.\1.feed_forward.intermediate_dense.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(.+)", r"encoder.layers.\1.feed_forward.output_dense.\2"),
)


@dataclass(frozen=True, kw_only=True)
class Audiobox:
    """clips: N ``Sound``s -> [N], about 1 to 10; NaN for a clip that is empty or not finite. The prompt is not read.

    axis: production quality, content enjoyment, content usefulness or production complexity. Channels are averaged, clips
    resampled to 16 kHz and cut into windows of 10 s, whose scores are averaged by their lengths, as the authors do.
    """

    pretrained_model_name_or_path: str = "facebook/audiobox-aesthetics"
    axis: Literal["PQ", "CE", "CU", "PC"] = "PQ"
    revision: str | None = None
    device: str | None = None
    name: ClassVar[str] = "audiobox"
    subject: ClassVar[str] = "clips"
    differentiable: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def __call__(self, clips: Sequence[Sound], prompts: Sequence[str]) -> Tensor:
        return score_each_clip(self._one, clips, prompts)

    def check(self) -> None:
        """Raises ModelError unless config and weights are there; a hub id is downloaded, nothing is loaded."""
        _ = self._config

    def identity(self) -> dict[str, Any]:
        return {"model": self.pretrained_model_name_or_path, "revision": self.revision, "axis": self.axis,
                "weights": sha256(folder_weights(self._folder, self.pretrained_model_name_or_path))}

    def _one(self, clip: Sound, prompt: str) -> float:
        wave = waveform(clip, RATE)
        parts = [wave[start:start + WINDOW * RATE] for start in range(0, len(wave), WINDOW * RATE)]
        scores = [self._window(part) for part in parts]
        return float(np.average(scores, weights=[len(part) for part in parts]))

    def _window(self, wave: np.ndarray) -> float:
        """At most a window, filled up with zeros that the frames' mean leaves out."""
        encoder, layers, head, (mean, std) = self._parts
        full = torch.zeros(1, WINDOW * RATE, device=layers.device)
        full[0, :len(wave)] = torch.from_numpy(wave)
        frames = min(math.ceil(len(wave) / HOP), (WINDOW * RATE - FIELD) // HOP + 1)  # as the authors count them
        heard = torch.arange(WINDOW * RATE, device=layers.device)[None] < FIELD + HOP * (frames - 1)
        states = torch.stack(encoder(full, attention_mask=heard, output_hidden_states=True).hidden_states)  # [L, 1, T, D]
        pooled = (layers.softmax(0)[:, None, None, None] * states).sum(0)[0, :frames].mean(0)
        return float(head(nn.functional.normalize(pooled, dim=0))) * std + mean

    @cached_property
    def _folder(self) -> Path:
        return model_folder(self.pretrained_model_name_or_path, self.revision, FILES)

    @cached_property
    def _config(self) -> dict[str, Any]:
        """Of the folder, checked."""
        name = self.pretrained_model_name_or_path
        folder_weights(self._folder, name)
        config = read_json(self._folder / "config.json", name)
        told = (config.get("target_transform") or {}).get(self.axis) or {}
        if not all(isinstance(told.get(key), (int, float)) for key in ("mean", "std")):
            raise ModelError(f"{name}: config.json: target_transform has no mean and std of {self.axis}, so this is no "
                             "Audiobox Aesthetics")
        for key, wanted in (("use_weighted_layer_sum", True), ("normalize_embed", True), ("proj_act_fn", "gelu"),
                            ("output_dim", 1)):
            if config.get(key, wanted) != wanted:
                raise ModelError(f"{name}: config.json: {key} is {config[key]!r}; supported is {wanted!r}")
        return config

    @cached_property
    def _parts(self) -> tuple:
        """WavLM, the layers' weights before softmax [L], the axis's head, (mean, std) of its targets."""
        from transformers import WavLMModel

        name, config, device = self.pretrained_model_name_or_path, self._config, on_device(self.device)
        file, *more = folder_weights(self._folder, name)
        if more:
            raise ModelError(f"{name}: its weights lie in {len(more) + 1} files; the published ones are one")
        check_shapes(shapes([file]), {f"layer_weights.{self.axis}": (config.get("nth_layer", 13),)}, name)
        state = renamed(tensors(file, ENCODER))
        with loading(name):
            encoder = WavLMModel(_sizes(state))
            encoder.load_state_dict(state)
            head = _head(config, encoder.config.hidden_size)
            head.load_state_dict(tensors(file, f"proj_layer.{self.axis}."))
        told, layers = config["target_transform"][self.axis], tensors(file, f"layer_weights.{self.axis}")[""]
        encoder, head = (module.to(device).eval().requires_grad_(False) for module in (encoder, head))
        return encoder, layers.to(device), head, (told["mean"], told["std"])


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' WavLM under transformers' names."""
    found = {}
    for name, value in state.items():
        pattern = next((pair for pair in _NAMES if re.fullmatch(pair[0], name)), None)
        found[name if pattern is None else re.sub(*pattern, name)] = value
    return found


def _sizes(state: Mapping[str, Tensor]):
    """The configuration of a WavLM of the base kind with these weights; raises KeyError where one is missing."""
    from transformers import WavLMConfig

    convolutions = [state[f"feature_extractor.conv_layers.{i}.conv.weight"].shape for i in range(len(_STRIDES))]
    positions = state["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].shape
    width, inner = state["encoder.layers.0.feed_forward.output_dense.weight"].shape
    buckets, heads = state["encoder.layers.0.attention.rel_attn_embed.weight"].shape
    layers = len([name for name in state if name.endswith("feed_forward.output_dense.weight")])
    return WavLMConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                       num_buckets=buckets, conv_dim=[shape[0] for shape in convolutions], conv_stride=list(_STRIDES),
                       conv_kernel=[shape[2] for shape in convolutions], num_conv_pos_embeddings=positions[2],
                       num_conv_pos_embedding_groups=width // positions[1], apply_spec_augment=True)


def _head(config: Mapping[str, Any], width: int) -> nn.Sequential:
    """Its layers stand at the places where the authors' stand, dropout among them."""
    layers: list[nn.Module] = []
    for _ in range(config.get("proj_num_layer", 1) - 1):
        layers += [nn.Linear(width, width), *([nn.LayerNorm(width)] if config.get("proj_ln") else []), nn.GELU(),
                   *([nn.Identity()] if config.get("proj_dropout") else [])]
    return nn.Sequential(*layers, nn.Linear(width, 1))
