"""Does the picture show the words that the prompt asks for? Character accuracy of recognised text, as in flow_grpo.

The recogniser is another model: a transformers VisionEncoderDecoder (TrOCR and its like, which read one line), or a service
over the protocol of ``remote`` that replies {"texts": [{"id": ..., "text": ...}]}; any OCR can be wrapped that way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _compat  # noqa: F401  (before transformers)
from ..errors import ModelError
from ..models.folder import read_json
from ..models.load import loading
from .base import UNREADABLE, as_pil
from .remote import Reading, exchange
from .service import Service
from .weights import folder_weights, model_folder, on_device, sha256, shapes

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


@dataclass(frozen=True, kw_only=True)
class TextRendering:
    """1 - min(Levenshtein, n) / n over the n characters of the target, in [0, 1] (flow_grpo, arXiv 2505.05470).

    The target is the prompt's text between its first double quotes, straight or curly; target and recognised text are
    compared in lower case and without white space. substring: a picture that holds the target anywhere has 1, the published
    rule; it rewards writing the target many times or among other letters, so set it to false when it is being optimised.
    NaN without quotes, with nothing between them, and where recognition failed.

    model: a transformers folder or hub id of a VisionEncoderDecoder, in safetensors; service: a remote recogniser. Give one.
    max_tokens: longest text that the model writes. batch_size: pictures at a time, or a request.
    """

    model: str | None = None
    revision: str | None = None
    service: Service | None = None
    substring: bool = True
    max_tokens: int = 64
    batch_size: int = 16
    device: str | None = None
    name = "ocr"
    differentiable = False
    columns = ()

    def __post_init__(self):
        if (self.model is None) == (self.service is None):
            raise ValueError("give either model or service, not both: what shall read the pictures?")
        for name in ("batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Tensor:
        """[N] float32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
        targets = {n: target for n, prompt in enumerate(prompts) if (target := target_of(prompt))}
        texts = self._read([images[n] for n in targets], [prompts[n] for n in targets])
        scores = torch.full((len(prompts),), torch.nan)
        for (n, target), text in zip(targets.items(), texts, strict=True):
            if text is not None:
                scores[n] = accuracy(target, text, substring=self.substring)
        return scores

    def check(self) -> None:
        """Raises ModelError for a folder that holds no such model, ServiceError for a service that does not answer."""
        if self.service is not None:
            return self.service.check()
        if read_json(self._folder / "config.json", self.model).get("model_type") != "vision-encoder-decoder":
            raise ModelError(f"{self.model}: is not a VisionEncoderDecoder model (config.json, model_type)")
        shapes(folder_weights(self._folder, self.model))

    def identity(self) -> dict[str, Any]:
        facts = {"substring": self.substring, "max_tokens": self.max_tokens}
        if self.service is not None:
            return {**facts, "service": self.service.shown}
        weights = sha256(folder_weights(self._folder, self.model))
        return {**facts, "model": self.model, "revision": self.revision, "weights_sha256": weights}

    def _read(self, images: Sequence[Any], prompts: Sequence[str]) -> list[str | None]:
        """What stands in each picture; None where it cannot be read."""
        if self.service is not None:
            return [reading.value for reading in exchange(self.service, images, prompts, self.batch_size, "text", _text)]
        texts: list[str | None] = []
        for start in range(0, len(images), self.batch_size):
            pictures = [_picture(image) for image in images[start : start + self.batch_size]]
            found = iter(self._recognise([picture for picture in pictures if picture is not None]))
            texts += [None if picture is None else next(found) for picture in pictures]
        return texts

    @cached_property
    def _folder(self) -> Path:
        return model_folder(self.model, self.revision, ["*.json", "*.safetensors", "*.txt", "*.model"])

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """Image processor, tokenizer, model."""
        from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

        self.check()
        local = {"local_files_only": True, "trust_remote_code": False}
        with loading(self.model):
            processor = AutoImageProcessor.from_pretrained(self._folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(self._folder, **local)
            model = VisionEncoderDecoderModel.from_pretrained(self._folder, local_files_only=True, use_safetensors=True)
        return processor, tokenizer, model.float().to(on_device(self.device)).eval().requires_grad_(False)

    def _recognise(self, pictures: list[Any]) -> list[str]:
        if not pictures:
            return []
        processor, tokenizer, model = self._parts
        pixels = processor(images=pictures, return_tensors="pt").pixel_values.to(on_device(self.device))
        with torch.no_grad():
            tokens = model.generate(pixel_values=pixels, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def target_of(prompt: str) -> str:
    """What the prompt wants written, in lower case without white space; "" where it names nothing."""
    found = _QUOTED.search(prompt)
    return _plain(found[1] or found[2] or "") if found else ""


def accuracy(target: str, text: str, *, substring: bool) -> float:
    """In [0, 1]; the target is plain already and not empty."""
    text = _plain(text)
    if substring and target in text:
        return 1.0
    return 1 - min(levenshtein(target, text), len(target)) / len(target)


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _picture(image: Any) -> Any:
    try:
        return as_pil(image)
    except UNREADABLE:
        return None


def _text(value: Any) -> Reading:
    return Reading(value) if isinstance(value, str) else Reading(None, "its text is not text")
