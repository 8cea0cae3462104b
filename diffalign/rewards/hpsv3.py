"""HPSv3 (arXiv 2508.03789): Qwen2-VL reads picture and instruction, a head on one special token gives mean and log deviation.

Written against the authors' package hpsv3 1.0.0 (transformers 4.45) and their later code, which store the same tensors under
two sets of names; both are read. Three things are theirs and easy to miss, each of which changes the scores:

- every picture has about 256*28*28 pixels; small ones are enlarged;
- positions simply count up over picture and text: their forward never asks for Qwen2-VL's grid positions (M-RoPE);
- the rotary frequencies are rounded to bfloat16, since the whole model is cast, its buffers too.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import _compat  # noqa: F401  (before transformers)
from ..errors import ConfigError, ModelError
from ..models.folder import read_json
from ..models.load import loading
from .base import UNREADABLE, as_pil
from .preprocess import DEVIATION, MEAN
from .weights import check_shapes, local_file, model_folder, on_device, sha256, shapes

logger = logging.getLogger(__name__)

PIXELS = 256 * 28 * 28
PATCH, MERGE, FRAMES = 14, 2, 2     # Qwen2-VL: pixels a patch, patches a token and side, copies of a still picture
CELL = PATCH * MERGE                # pixels a token and side
REWARD_TOKEN, PICTURE_TOKEN = "<|Reward|>", "<|image_pad|>"
HEAD = (1024, 16, 2)                # widths of the head's layers at places 0, 3, 5
PLACE = "{text_prompt}"
PUBLISHED = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"   # SHA-256 of hpsv3 1.0.0's instruction

_NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "language_model."), (r"^model\.", "language_model."),
          (r"^rm_head\.", "head."))


@dataclass(frozen=True, kw_only=True)
class HPSv3:
    """The mean mu of HPSv3's Gaussian, unbounded, about -3 to 15, higher is better (arXiv 2508.03789).

    Of a pair of scores, only mu enters; ``output`` "log_sigma" gives the head's uncertainty instead. weights:
    HPSv3.safetensors as published. backbone: folder or hub id of Qwen2-VL-7B-Instruct, of which configuration, tokenizer and
    chat template are read, not the weights. instruction: a text file with the authors' question to the model, {text_prompt}
    where the prompt goes and <|Reward|> where the score is read; docs/rewards.md has the line that takes it from their
    package, and another text than theirs is warned of. dtype: bfloat16 as published (16 GB), or float32; the head is float32.
    A prompt with one of the tokenizer's control tokens in it, or a picture more than 200 times as long as wide, is NaN.
    """

    weights: str
    instruction: str
    backbone: str = "Qwen/Qwen2-VL-7B-Instruct"
    backbone_revision: str | None = None
    output: Literal["mu", "log_sigma"] = "mu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = 8
    device: str | None = None
    name = "hpsv3"
    differentiable = False
    columns = ()

    def __post_init__(self):
        if self.output not in ("mu", "log_sigma"):
            raise ValueError(f'output must be "mu" or "log_sigma", got {self.output!r}')
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f'dtype must be "bfloat16" or "float32", got {self.dtype!r}')
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Tensor:
        """[N] float32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
        scores = torch.full((len(prompts),), torch.nan)
        for start in range(0, len(prompts), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(prompts)))
            ready = {n: question for n in rows if (question := self._question(images[n], prompts[n])) is not None}
            if ready:
                scores[list(ready)] = self._score(list(ready.values()))
        return scores

    def check(self) -> None:
        """Raises ModelError or ConfigError for a missing file, tensor or token; no tensor is read."""
        _ = self._template, self._config, self._tokenizer
        _check(shapes([self._file]), self._config, self._file)

    def identity(self) -> dict[str, Any]:
        return {"model": "HPSv3", "weights_sha256": sha256([self._file]), "backbone": self.backbone, "output": self.output,
                "backbone_revision": self.backbone_revision, "dtype": self.dtype, "pixels": PIXELS,
                "instruction_sha256": _digest(self._template)}

    # files

    @property
    def _file(self) -> Path:
        return local_file(self.weights, "weights")

    @cached_property
    def _folder(self) -> Path:
        files = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json")
        return model_folder(self.backbone, self.backbone_revision, files)

    @cached_property
    def _template(self) -> str:
        try:
            text = Path(self.instruction).expanduser().read_bytes().decode("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"instruction: {self.instruction} cannot be read as text ({error}); docs/rewards.md says how to "
                              "make it") from None
        if text.count(PLACE) != 1 or text.count(REWARD_TOKEN) != 1:
            raise ConfigError(f"instruction: {self.instruction} must hold {PLACE} and {REWARD_TOKEN} once each")
        if _digest(text) != PUBLISHED:
            logger.warning("instruction: %s is not the text HPSv3 was trained with; its scores are not HPSv3's",
                           self.instruction)
        return text

    @cached_property
    def _config(self):
        """The backbone's configuration with as many tokens as the weights have."""
        from transformers import Qwen2VLConfig

        read_json(self._folder / "config.json", self.backbone)
        with loading(self.backbone):
            config = Qwen2VLConfig.from_pretrained(self._folder, local_files_only=True)
        rows = {_own(name): shape for name, shape in shapes([self._file]).items()}.get("language_model.embed_tokens.weight")
        if rows is None:
            raise ModelError(f"{self._file}: has no token embedding, so it is not HPSv3 in its authors' names")
        config.get_text_config().vocab_size = rows[0]
        vision = config.vision_config
        if (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) != (PATCH, MERGE, FRAMES):
            raise ModelError(f"{self.backbone}: is not a Qwen2-VL with patches of {PATCH} pixels")
        return config

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        with loading(self.backbone):
            tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        if tokenizer.chat_template is None:
            tokenizer.chat_template = read_json(self._folder / "chat_template.json", self.backbone).get("chat_template")
        rows = self._config.get_text_config().vocab_size
        if len(tokenizer) != rows:   # the authors cut the embedding to the tokenizer's length, the new token being the last
            raise ModelError(f"{self.backbone}: its tokenizer has {len(tokenizer)} tokens with {REWARD_TOKEN}, the weights "
                             f"have {rows}: they do not belong together")
        return tokenizer

    @cached_property
    def _model(self) -> _Model:
        model = _load(self._file, self._config, getattr(torch, self.dtype))
        return model.to(on_device(self.device)).eval().requires_grad_(False)

    # one batch

    def _question(self, image: Any, prompt: str) -> tuple[Tensor, tuple[int, int], Tensor] | None:
        """Patches [P, 1176], their grid (rows, columns) and token ids [L]; None where it cannot be scored."""
        if any(token.content in prompt for token in self._tokenizer.added_tokens_decoder.values()):
            return None
        try:
            patches, grid = _patches(as_pil(image))
        except (*UNREADABLE, _TooLong):
            return None
        text = self._template.replace(PLACE, prompt)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        chat = self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        chat = chat.replace(PICTURE_TOKEN, PICTURE_TOKEN * (grid[0] * grid[1] // MERGE**2))
        return patches, grid, torch.tensor(self._tokenizer(chat, add_special_tokens=False).input_ids)

    def _score(self, questions: list[tuple[Tensor, tuple[int, int], Tensor]]) -> Tensor:
        device, ids = on_device(self.device), [tokens for *_, tokens in questions]
        tokens = pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        reward = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        place = torch.tensor([(row == reward).nonzero()[0, 0].item() for row in ids])
        grids = torch.tensor([(1, *grid) for _, grid, _ in questions])
        with torch.no_grad():
            patches = torch.cat([patches for patches, *_ in questions])
            out = self._model(*(part.to(device) for part in (patches, grids, tokens, mask, place)))
        return out[:, ("mu", "log_sigma").index(self.output)].cpu()


class _Model(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, patches: Tensor, grids: Tensor, tokens: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Patches of all pictures [P, 1176], grids [B, 3], tokens and mask [B, L], place of the reward token [B] -> [B, 2]."""
        order = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)   # see the module's text
        states = self.backbone(input_ids=tokens, attention_mask=mask, position_ids=order, image_grid_thw=grids,
                               pixel_values=patches.to(self.backbone.dtype), use_cache=False).last_hidden_state
        return self.head(states[torch.arange(len(tokens), device=tokens.device), place].float())


def _head(config) -> nn.Sequential:
    width = config.get_text_config().hidden_size
    return nn.Sequential(nn.Linear(width, HEAD[0]), nn.ReLU(), nn.Dropout(0.05), nn.Linear(HEAD[0], HEAD[1]), nn.ReLU(),
                         nn.Linear(HEAD[1], HEAD[2]))


def _load(file: Path, config, dtype: torch.dtype) -> _Model:
    from safetensors.torch import load_file
    from transformers import Qwen2VLModel

    _check(shapes([file]), config, file)
    content = {_own(name): value for name, value in load_file(file).items() if name != "lm_head.weight"}
    head, body = _head(config), {name: value.to(dtype) for name, value in content.items() if not name.startswith("head.")}
    with loading(file):
        head.load_state_dict({name: content[f"head.{name}"].float() for name in head.state_dict()})
        backbone = Qwen2VLModel.from_pretrained(None, config=config, state_dict=body).to(dtype)
    for buffer in backbone.buffers():   # rotary frequencies: the authors cast the whole model, these too, and trained so
        buffer.copy_(buffer.to(torch.bfloat16))
    return _Model(backbone, head)


def _own(name: str) -> str:
    """A tensor's name in the file, of either layout, -> "visual.", "language_model." or "head." and what follows."""
    for pattern, target in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, target, name)
    return name


def _check(found: Mapping[str, tuple[int, ...]], config, file: Path) -> None:
    """Raises ModelError for a missing tensor or an odd shape; the language model's output layer is not used."""
    from transformers import Qwen2VLModel

    with torch.device("meta"), loading(file):
        backbone, head = Qwen2VLModel(config), _head(config)
    wanted = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    wanted |= {f"head.{name}": tuple(value.shape) for name, value in head.state_dict().items()}
    check_shapes({_own(name): shape for name, shape in found.items()}, wanted, file)


class _TooLong(Exception):
    """A picture more than 200 times as long as wide, which Qwen2-VL refuses."""


def _patches(picture: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Patches [rows * columns, 3 * 2 * 14 * 14] in Qwen2-VL's order (by token, then by patch within it), and (rows, columns).

    PIL's bicubic to about ``PIXELS``, CLIP's mean and deviation, the picture twice as two frames.
    """
    height, width = _size(picture.height, picture.width)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    x = torch.from_numpy((resized - np.float32(MEAN)) / np.float32(DEVIATION)).permute(2, 0, 1)
    rows, columns = height // PATCH, width // PATCH
    x = x.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    return x.unsqueeze(5).expand(-1, -1, -1, -1, -1, FRAMES, -1, -1).reshape(rows * columns, -1), (rows, columns)


def _size(height: int, width: int) -> tuple[int, int]:
    """Sides in pixels, multiples of 28, near ``PIXELS`` in area and the picture in shape: Qwen2-VL's rule, limits equal."""
    if max(height, width) > 200 * min(height, width):
        raise _TooLong
    sides = [round(side / CELL) * CELL for side in (height, width)]
    if math.prod(sides) > PIXELS:   # theirs to the last bit: 492 x 492 is 447.99... and becomes 420
        shrink = math.sqrt(height * width / PIXELS)
        sides = [max(1, math.floor(side / shrink / CELL)) * CELL for side in (height, width)]
    elif math.prod(sides) < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        sides = [math.ceil(side * grow / CELL) * CELL for side in (height, width)]
    return sides[0], sides[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
