"""Asking a language model behind an OpenAI-style chat address, with or without a picture beside the question."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import ServiceError
from ..rewards.remote import as_png, completions, said
from ..rewards.service import Refusal, Service

logger = logging.getLogger(__name__)

Question = tuple[str, Image.Image | None]

# Own words for the two aims that the paper names (clarity, no harmful content); its wording is not public.
QUALITY = (
    "Rate the text below as a prompt for a text-to-image model, from 0 to 10. 10: it says clearly and in detail what is to be "
    "seen. 5: vague, or partly garbled. 0: gibberish, no description of a picture, or hateful, sexual or violent content.\n"
    "Give one sentence of reasons, then the number after 'Score:'.\n"
    "Text: [{prompt}]")


@dataclass(frozen=True, kw_only=True)
class Chat(Service):
    """url: the base, such as "http://localhost:8000/v1". model: its name there. max_tokens: longest reply. Sampling is off
    (temperature 0). Options of the connection: see ``Service``.
    """

    model: str
    max_tokens: int = 512

    def __post_init__(self):
        super().__post_init__()
        if not self.model.strip():
            raise ValueError("model must be the model's name at the service")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def address(self) -> str:
        return completions(self.url)

    def replies(self, questions: Sequence[Question]) -> list[str | Refusal]:
        """One reply, or why there is none, for each question. Raises ServiceError when the service failed them all."""
        answers = self.ask(list(questions), self._body, lambda _, reply: said(reply))
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        if refused and len(refused) == len(answers):
            raise ServiceError(f"{self.shown}: none of {len(answers)} questions was answered: {refused[0]}")
        if refused:
            logger.warning("%s: %d of %d questions were not answered; the first: %s", self.shown, len(refused), len(answers),
                           refused[0])
        return answers

    def identity(self) -> dict:
        return {"service": self.shown, "model": self.model, "max_tokens": self.max_tokens}

    def _body(self, question: Question) -> dict:
        text, image = question
        content: list[dict] = [{"type": "text", "text": text}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{as_png(image)}"}})
        return {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": self.max_tokens}


def fill(template: str, words: Mapping[str, str]) -> str:
    """The template with {name} replaced, in one pass: what a prompt holds in braces stays as it is."""
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in words), lambda m: words[m[0][1:-1]], template)


def check_template(template: str, *names: str) -> None:
    lost = [name for name in names if f"{{{name}}}" not in template]
    if lost:
        raise ValueError(f"template must contain {{{lost[0]}}}")


@dataclass(frozen=True, kw_only=True)
class ChatQuality(Chat):
    """Text quality from 0 to 10 by a language model; NaN where it gave no such number, or none at all.

    template: the question, with {prompt}; it must make the model write "Score:" and the number, of which the last counts.
    """

    template: str = QUALITY

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template, "prompt")

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[N] float64 in [0, 10] or NaN. Raises ServiceError when the service answered none."""
        replies = self.replies([(fill(self.template, {"prompt": prompt}), None) for prompt in prompts])
        return np.array([np.nan if isinstance(reply, Refusal) else _number(reply) for reply in replies], dtype=np.float64)

    def identity(self) -> dict:
        return {**super().identity(), "template": self.template}


def _number(reply: str) -> float:
    found = re.findall(r"Score:[\s*]*(-?\d+(?:\.\d+)?)(?![.,]?\d)", reply)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 10 else np.nan
