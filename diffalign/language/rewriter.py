"""The language model that rewrites: where it comes from, how it is asked. One template for training and for use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import DataError, ModelError
from ..models.folder import read_json
from ..models.load import loading
from ..rewards.weights import folder_weights, model_folder, sha256, shapes

TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template*")
FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", *TOKENIZER)

INSTRUCTION = (
    "Rewrite the user's prompt for a text-to-image model so that the picture shows exactly what was asked for, clearly and in "
    "good quality. Keep every object, number, colour, name and relation of the user's prompt; invent no new subject. Answer "
    "with the new prompt alone.")


@dataclass(frozen=True, kw_only=True)
class Rewriter:
    """A causal language model with a chat template: folder or hub id (revision pins it).

    instruction: the system message, "" for none; the user's prompt is the user's message. max_new_tokens, temperature, top_k,
    top_p: how candidates are sampled (the released values of Prompt-A-Video); ``prompts rewrite`` takes the likeliest token.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    instruction: str = INSTRUCTION
    max_new_tokens: int = 250
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if not self.pretrained_model_name_or_path.strip():
            raise ValueError("pretrained_model_name_or_path is empty; give the folder or hub id of a language model")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"temperature must be above 0, top_p above 0 and at most 1, top_k not negative; got "
                             f"{self.temperature}, {self.top_p}, {self.top_k}")

    @cached_property
    def folder(self) -> Path:
        """A hub id is downloaded, once."""
        return model_folder(self.pretrained_model_name_or_path, self.revision, FILES)

    def check(self) -> None:
        """Raises ModelError for what is no causal language model in safetensors, brings code, or has no chat template."""
        name = self.pretrained_model_name_or_path
        config = read_json(self.folder / "config.json", name)
        for file in ("config.json", "tokenizer_config.json"):
            if (self.folder / file).is_file() and "auto_map" in read_json(self.folder / file, name):
                raise ModelError(f"{name}: {file} has an auto_map, code that comes with the model; only transformers' own "
                                 "classes are run")
        if not any(str(known).endswith("ForCausalLM") for known in config.get("architectures") or ()):
            raise ModelError(f"{name}: config.json names {config.get('architectures')}, which is no causal language model "
                             "(...ForCausalLM); TRL trains nothing else")
        shapes(folder_weights(self.folder, name))
        self.tokenizer()

    def identity(self) -> dict[str, Any]:
        """JSON-ready facts that decide its answers."""
        words = [file for pattern in TOKENIZER for file in self.folder.glob(pattern)]
        return {"model": sha256([*folder_weights(self.folder, self.pretrained_model_name_or_path), *words]),
                "instruction": self.instruction, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
                "top_k": self.top_k, "top_p": self.top_p, "dtype": self.dtype}

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        name = self.pretrained_model_name_or_path
        with loading(name):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.chat_template is None:
            raise ModelError(f"{name}: its tokenizer has no chat template; take the instruct version of the model, or add a "
                             "chat_template.jinja")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{name}: its tokenizer has no end token, so no answer would end")
        return tokenizer

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with loading(self.pretrained_model_name_or_path):
            return AutoModelForCausalLM.from_pretrained(self.folder, use_safetensors=True, local_files_only=True,
                                                        trust_remote_code=False, dtype=getattr(torch, self.dtype))

    def messages(self, prompt: str, answer: str | None = None) -> list[dict[str, str]]:
        """The one template: system, user and, for an answer, assistant."""
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": prompt},
                *([] if answer is None else [{"role": "assistant", "content": answer}])]


class Writer:
    """A loaded rewriter. Answers depend on the prompts asked together and the seed; nobody else's randomness is touched.

    allowed: the token ids that an answer's n-th token (from 0) may be; None for any.
    """

    def __init__(self, source: Rewriter, device: torch.device | str = "cpu",
                 allowed: Callable[[int], list[int]] | None = None):
        self.source, self.device, self.allowed = source, torch.device(device), allowed
        self._tokenizer, self._model = source.tokenizer(), source.model().to(device).eval()
        self._tokenizer.padding_side = "left"  # answers begin where the padded prompts end
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token

    def sample(self, prompts: Sequence[str], seed: int) -> list[str]:
        """One sampled rewrite of each. Raises DataError for a prompt that is longer than the model reads."""
        source = self.source
        with _seeded(seed, self.device):
            return self._ask(prompts, do_sample=True, temperature=source.temperature, top_k=source.top_k, top_p=source.top_p)

    def best(self, prompts: Sequence[str], batch_size: int = 16) -> list[str]:
        """The rewrite of likeliest tokens of each; the prompt itself where that is empty. Raises DataError as ``sample``
        does.
        """
        texts = [text for start in range(0, len(prompts), batch_size)
                 for text in self._ask(prompts[start:start + batch_size], do_sample=False)]
        return [text or prompt for prompt, text in zip(prompts, texts, strict=True)]

    def _ask(self, prompts: Sequence[str], **how: Any) -> list[str]:
        given = self._tokenizer.apply_chat_template([self.source.messages(prompt) for prompt in prompts], padding=True,
                                                    add_generation_prompt=True, return_dict=True, return_tensors="pt")
        length, most = given["input_ids"].shape[1], getattr(self._model.config, "max_position_embeddings", None)
        room = self.source.max_new_tokens if most is None else min(self.source.max_new_tokens, most - length)
        if room < 1:
            longest = prompts[int(given["attention_mask"].sum(1).argmax())]
            raise DataError(f'the prompt "{longest[:60]}..." has {length} tokens with the instruction, and the language model '
                            f"reads {most}; shorten it")
        if self.allowed is not None:
            how["prefix_allowed_tokens_fn"] = lambda row, ids: self.allowed(len(ids) - length)
        kept = {name: given[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ids = self._model.generate(**kept, max_new_tokens=room, max_length=None,
                                       pad_token_id=self._tokenizer.pad_token_id, **how)
        return [tidy(text) for text in self._tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)]


def tidy(text: str) -> str:
    """One line without the quotes that chat models like to put around an answer."""
    text = " ".join(text.split())
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" else text


@contextmanager
def _seeded(seed: int, device: torch.device):
    """transformers samples from the global generator; whoever else uses it finds it as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
