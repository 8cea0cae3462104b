"""What a filter may know of a prompt: where it lies among the others (embedders), and how good it is (qualities)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...data.store import write_aside
from ...errors import ModelError, ResourceError
from ..chat import ChatQuality

CHUNK = 64  # prompts between two writes of remembered qualities


class Embedder(Protocol):
    """N prompts -> [N, D], a numpy or scipy sparse array; near in meaning is near in Euclidean distance."""

    def __call__(self, prompts: Sequence[str]) -> Any: ...


class Quality(Protocol):
    """N prompts -> [N] float64, higher is better; NaN means unknown, never 0. identity(): JSON-ready facts that pin the
    numbers, for a quality worth remembering on disk; left out by one that is quick to compute.
    """

    def __call__(self, prompts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Ngrams:
    """TF-IDF of pieces of words, ``smallest`` to ``largest`` letters, with unit length: no download, any language.

    It sees spelling rather than meaning: two unlike words for one thing are far apart.
    """

    smallest: int = 3
    largest: int = 5

    def __post_init__(self):
        if not 1 <= self.smallest <= self.largest <= 16:
            raise ValueError(f"smallest and largest must be in order within 1..16, got {self.smallest} and {self.largest}")

    def __call__(self, prompts: Sequence[str]) -> Any:
        """[N, D] scipy sparse float64; a prompt without any letter is a zero row."""
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(self.smallest, self.largest), lowercase=True)
        try:
            return vectorizer.fit_transform(prompts)
        except ValueError:  # an empty vocabulary
            return csr_matrix((len(prompts), 1), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """Mean of a text encoder's last states over a prompt's tokens, with unit length: a CLIP text model, a sentence encoder.

    folder: a transformers model with its tokenizer, in safetensors. device: null takes CUDA where there is one.
    """

    folder: str
    batch_size: int = 64
    device: str | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def check(self) -> None:
        """Raises ModelError for a folder without a model in safetensors, or with code of its own; loads no weights."""
        from ...models.folder import check_weights, read_json, weight_files

        folder = Path(self.folder)
        if not folder.is_dir():
            raise ModelError(f"{self.folder}: no such folder; download the text encoder once, such as with "
                             "`hf download OWNER/NAME --local-dir FOLDER`, and name that folder")
        for file in sorted(folder.glob("*config.json")):
            if "auto_map" in read_json(file, self.folder):
                raise ModelError(f"{self.folder}: {file.name} has an auto_map, code that comes with the model; diffalign runs "
                                 "only classes of transformers")
        read_json(folder / "config.json", self.folder)
        check_weights(weight_files(folder, None, self.folder), self.folder)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[N, D] float64."""
        import torch

        tokenizer, model, device = self._loaded
        length = getattr(model.config, "max_position_embeddings", None) or 512
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            tokens = tokenizer(list(prompts[start:start + self.batch_size]), padding=True, truncation=True,
                               max_length=min(tokenizer.model_max_length, length), return_tensors="pt").to(device)
            with torch.no_grad():
                states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            weight = tokens["attention_mask"][..., None].to(states.dtype)
            mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
            parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu().double().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 1))

    @cached_property
    def _loaded(self) -> tuple:
        import torch
        from transformers import AutoModel, AutoTokenizer, CLIPTextModel

        from ...models.folder import read_json

        self.check()
        kind = read_json(Path(self.folder) / "config.json", self.folder).get("model_type")
        loader = CLIPTextModel if kind in ("clip", "clip_text_model") else AutoModel
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = loader.from_pretrained(self.folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{self.folder}: cannot be loaded as a text encoder ({reason})") from None
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        return tokenizer, model.to(device).eval().requires_grad_(False), device


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A rough quality from 0 to 10 without any model: 10 x length x variety x letters.

    length: 1 from ``enough`` letters on, in proportion below. variety: share of distinct words. letters: share of characters
    that are letters, digits, spaces or common punctuation. It finds stubs, repetition and debris, not nonsense or harm.
    """

    enough: int = 20

    def __post_init__(self):
        if self.enough < 1:
            raise ValueError(f"enough must be at least 1 letter, got {self.enough}")

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[N] float64 in [0, 10]; none is unknown."""
        return np.array([self._one(prompt) for prompt in prompts], dtype=np.float64)

    def _one(self, prompt: str) -> float:
        words = re.findall(r"\w+", prompt.lower())
        if not words:
            return 0.0
        length = min(1.0, sum(map(str.isalpha, prompt)) / self.enough)
        fine = sum(c.isalnum() or c.isspace() or c in ",.;:'\"-!?()’" for c in prompt) / len(prompt)
        return 10 * length * len(set(words)) / len(words) * fine


def remembered(quality: Quality, prompts: Sequence[str], folder: Path) -> np.ndarray:
    """[N] float64, asking the quality once for each distinct prompt, ever: what has an ``identity`` is kept in ``folder``.

    An unknown one is not kept, so it is asked again in another run.
    """
    if not hasattr(quality, "identity"):
        return _checked(quality, prompts)
    identity = json.dumps(quality.identity(), sort_keys=True)
    path = folder / f"text_quality-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    known = _read(path)
    missing = sorted(set(prompts) - set(known))
    for start in range(0, len(missing), CHUNK):
        part = missing[start:start + CHUNK]
        told = {prompt: float(value) for prompt, value in zip(part, _checked(quality, part)) if math.isfinite(value)}
        if told:
            known |= told
            _write(path, {"identity": quality.identity(), "quality": known})
    return np.array([known.get(prompt, math.nan) for prompt in prompts], dtype=np.float64)


def _write(path: Path, tree: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path.parent}: cannot be made ({error.strerror}); choose another output_dir") from None
    content = (json.dumps(tree, ensure_ascii=False, sort_keys=True) + "\n").encode()
    write_aside(path, content, "the text qualities", "choose an output_dir on another disk")


def _read(path: Path) -> dict[str, float]:
    """Empty where there is none, or a file that somebody damaged: then it is asked anew."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["quality"]
        return {str(prompt): float(value) for prompt, value in known.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _checked(quality: Quality, prompts: Sequence[str]) -> np.ndarray:
    scores = np.asarray(quality(prompts), dtype=np.float64)
    if scores.shape != (len(prompts),):
        raise ValueError(f"{type(quality).__name__} gave {scores.shape} qualities for {len(prompts)} prompts")
    return np.where(np.isfinite(scores), scores, np.nan)


EMBEDDERS = {"ngrams": Ngrams, "text_model": TextModel}
QUALITIES = {"rules": Rules, "chat": ChatQuality}
