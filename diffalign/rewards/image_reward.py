"""ImageReward v1.0 (arXiv 2304.05977): BLIP-large reads picture and prompt together, a head gives one number.

The original is a checkpoint of BLIP's own code (a timm-like ViT, a BERT with cross-attention, "blip.*" and "mlp.*" names).
Here the modules are transformers' BLIP, and the tensors are moved onto their names; widths and depths are read from the
tensors, heads are 64 wide as in every BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before transformers)
from ..errors import ModelError
from ..models.load import loading
from .preprocess import Preprocess, score_batches
from .weights import check_shapes, local_file, model_folder, on_device, sha256, shapes, tensors

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072   # of the head's output over the authors' data
LONGEST = 35          # tokens; the rest of a long prompt never counts
HEAD = 64             # width of an attention head in all BLIP models
PLACES, WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)   # of the head's linear layers; dropout stood between, no activation

# From the checkpoint's names to transformers'. What is not named here keeps its name (the text encoder's do).
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
_PARTS = {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.layers.": "head."}


@dataclass(frozen=True, kw_only=True)
class ImageReward:
    """(head - 0.16717) / 1.03334, about -2.3 to 2, higher is better (ImageReward v1.0, arXiv 2304.05977).

    weights: ImageReward.safetensors, the published ImageReward.pt converted with its tensors' names (docs/rewards.md).
    tokenizer: a folder or hub id of bert-base-uncased's tokenizer; text beyond 35 tokens is cut, as the original does.
    Raises ModelError where tensors are missing: the original loads such a file silently.
    """

    weights: str
    tokenizer: str = "google-bert/bert-base-uncased"
    tokenizer_revision: str | None = None
    batch_size: int = 16
    device: str | None = None
    name = "image_reward"
    differentiable = True
    columns = ()

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Tensor:
        """[N] float32, NaN where a picture cannot be decoded; with gradient to float tensors that ask for it."""
        return score_batches(self._score, self._prepare, images, prompts, self.batch_size)

    def check(self) -> None:
        """Raises ModelError unless the file has all tensors in fitting shapes and the tokenizer is there."""
        _sizes(shapes([self._file]), self._file)
        self._tokenizer_folder()

    def identity(self) -> dict[str, Any]:
        return {"model": "ImageReward-v1.0", "weights_sha256": sha256([self._file]), "tokenizer": self.tokenizer,
                "tokenizer_revision": self.tokenizer_revision, "scale": f"(head - {MEAN}) / {DEVIATION}"}

    @property
    def _file(self) -> Path:
        return local_file(self.weights, "weights")

    @cached_property
    def _model(self) -> _Model:
        return _load(self._file).to(on_device(self.device)).eval().requires_grad_(False)

    @cached_property
    def _prepare(self) -> Preprocess:
        return Preprocess(size=self._model.size)

    @cached_property
    def _tokenizer(self):
        from transformers import BertTokenizerFast

        with loading(self.tokenizer):
            return BertTokenizerFast.from_pretrained(self._tokenizer_folder(), local_files_only=True)

    def _tokenizer_folder(self) -> Path:
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
        folder = model_folder(self.tokenizer, self.tokenizer_revision, files)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise ModelError(f"{self.tokenizer}: holds neither tokenizer.json nor vocab.txt of a BERT tokenizer")
        return folder

    def _score(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, S, S] and B texts -> [B]."""
        device = on_device(self.device)
        # always 35 long: a text's numbers must not depend on how long its neighbours are
        text = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
        raw = self._model(pictures.to(device), text.input_ids.to(device), text.attention_mask.to(device))
        return (raw - MEAN) / DEVIATION


class _Model(nn.Module):
    """size: side of the pictures, pixels."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        # transformers' defaults are not the original's: 1e-5 and 8 heads there
        self.vision = BlipVisionModel(BlipVisionConfig(layer_norm_eps=1e-6, **sizes["vision"]))
        # is_decoder builds the cross-attention; calls say is_decoder=False, so that the mask is BERT's and not causal
        special = {"bos_token_id": None, "sep_token_id": None, "eos_token_id": None}
        self.text = BlipTextModel(BlipTextConfig(is_decoder=True, layer_norm_eps=1e-12, **special, **sizes["text"]),
                                  add_pooling_layer=False)
        self.head = nn.Sequential()
        for place, inputs, outputs in zip(PLACES, (sizes["text"]["hidden_size"], *WIDTHS), WIDTHS, strict=False):
            self.head.add_module(str(place), nn.Linear(inputs, outputs))
        self.size = sizes["vision"]["image_size"]

    def forward(self, pictures: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, 3, S, S], [B, L], [B, L] -> the head's raw output [B]."""
        seen = self.vision(pixel_values=pictures).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen,
                         encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long), is_decoder=False)
        return self.head(read.last_hidden_state[:, 0])[:, 0]


def _load(file: Path) -> _Model:
    with torch.device("meta"):
        model = _Model(_sizes(shapes([file]), file))
    wanted = model.state_dict()
    content = {own: value for name, value in tensors(file).items() if (own := _own(name)) in wanted}
    with loading(file):
        model.load_state_dict(content, assign=True)
    places = model.text.embeddings   # its position ids are a buffer that is computed, not loaded
    places.position_ids = torch.arange(places.position_ids.shape[-1])[None]
    return model


def _own(name: str) -> str:
    """The checkpoint's name of a tensor -> this model's."""
    for start, part in _PARTS.items():
        if name.startswith(start):
            rest = name.removeprefix(start)
            return part + (_vision(rest) if part == "vision." else rest)
    return name


def _vision(name: str) -> str:
    for pattern, target in _VISION:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    return name


def _sizes(found: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """Configurations of the two encoders, from shapes alone. Raises ModelError for another layout, gaps or odd shapes.

    Further tensors do no harm: BLIP's projections and stored position ids lie in the published file and are not read.
    """
    own = {_own(name): shape for name, shape in found.items()}
    try:
        width, _, patch, _ = own["vision.embeddings.patch_embedding.weight"]
        vocabulary, text_width = own["text.embeddings.word_embeddings.weight"]
        side = round((own["vision.embeddings.position_embedding"][1] - 1) ** 0.5)
        vision = {"hidden_size": width, "num_attention_heads": max(1, width // HEAD), "patch_size": patch,
                  "image_size": side * patch, "intermediate_size": own["vision.encoder.layers.0.mlp.fc1.weight"][0],
                  "num_hidden_layers": _count(own, r"vision\.encoder\.layers\.(\d+)\.")}
        text = {"hidden_size": text_width, "num_attention_heads": max(1, text_width // HEAD), "vocab_size": vocabulary,
                "encoder_hidden_size": width, "intermediate_size": own["text.encoder.layer.0.intermediate.dense.weight"][0],
                "max_position_embeddings": own["text.embeddings.position_embeddings.weight"][0],
                "num_hidden_layers": _count(own, r"text\.encoder\.layer\.(\d+)\.")}
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{file}: is not ImageReward under its authors' names ({error} is missing or odd); convert the "
                         "published file as docs/rewards.md says") from None
    with torch.device("meta"), loading(file):
        wanted = {name: tuple(value.shape) for name, value in _Model({"vision": vision, "text": text}).state_dict().items()}
    check_shapes(own, wanted, file)
    return {"vision": vision, "text": text}


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """Number of layers: one more than the largest number in the names."""
    return 1 + max(int(found[1]) for name in names if (found := re.match(pattern, name)))
