"""Rewards behind HTTP: any scorer over a small JSON protocol, and a vision-language judge over OpenAI-style chat.

So a reward that needs another environment, machine or maker can be used without installing it here. Both send lossless PNG
and nothing else; what comes back is distrusted (``service``): see there for deadline, retries and secrets.

The protocol. One request is a POST with a JSON body; ids are new for every call:

    {"pictures": [{"id": "9f2c-0", "prompt": "a red circle", "png": "<base64 of the PNG file>"}, ...]}

and the reply, of status 200, gives every id its score (null: cannot score it), in any order:

    {"scores": [{"id": "9f2c-0", "score": 21.4}, ...]}

``scripts/serve_reward.py`` serves any reward of this package that way. A score belongs to its id alone: ids that were not
asked are ignored, a missing id is NaN, and so is an id with two different scores. A service that reads text instead (see
``ocr``) replies {"texts": [{"id": ..., "text": ...}]}.
"""

from __future__ import annotations

import base64
import io
import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import UNREADABLE, as_pil
from .service import Refusal, Service, report

LARGEST = torch.finfo(torch.float32).max

# Own words for the task UnifiedReward was trained on (arXiv 2503.05236): caption, criteria, a number after "Final Score:".
POINTWISE = (
    "Here is a text caption and a picture that was generated from it. Judge the picture on two things.\n"
    "1. Alignment: do the objects, their attributes and their relations agree with the caption?\n"
    "2. Quality: is the picture clear, detailed, right in colour and pleasing?\n"
    "List the key elements of the caption as 'element (type): value', with value 1 where the picture shows it and 0 where it "
    "does not. Then give a score from 1 to 5, decimals allowed, after 'Final Score:'.\n"
    "Text Caption: [{prompt}]"
)


class Reading(NamedTuple):
    """What a service said of one picture. reason: why there is no value, or None."""

    value: Any
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RemoteReward(Service):
    """Any scorer behind HTTP, over the protocol of this module. Scale and range are the service's.

    batch_size: pictures a request. Options of the connection: see ``Service``.
    Raises ServiceError when every request of a call failed; single failures are NaN and one warning.
    """

    batch_size: int = 8
    name = "remote"
    differentiable = False
    columns = ()

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Tensor:
        """[N] float32."""
        readings = exchange(self, images, prompts, self.batch_size, "score", finite)
        return _scores(readings)

    def identity(self) -> dict:
        return {"reward": self.name, "service": self.shown}


@dataclass(frozen=True, kw_only=True)
class VLMJudge(Service):
    """A vision-language model behind an OpenAI-style chat completions address, asked for a number; 1 to 5 by default.

    url: the base, such as "http://localhost:8000/v1". model: its name there. template: the question, with {prompt} where the
    caption goes; the default asks for what UnifiedReward's pointwise mode gives (arXiv 2503.05236) in words of our own: give
    the exact words of your model's authors to repeat their numbers. pattern: a regular expression with one group around the
    number; the last match counts, since a model may quote the question before it answers. low, high: the legal range; a
    number outside it, or none, is NaN. normalise: give (number - low) / (high - low), in [0, 1], instead.
    max_tokens: longest reply; one that ends before its number is NaN. Sampling is off (temperature 0), though many servers do
    not promise equal answers to equal questions.
    """

    model: str
    template: str = POINTWISE
    pattern: str = r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)(?![.,]?\d)"
    low: float = 1.0
    high: float = 5.0
    normalise: bool = False
    max_tokens: int = 512
    name = "vlm"
    differentiable = False
    columns = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ValueError("model must be the judge's name at the service")
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"pattern must have one group, around the number, got {groups}")
        if not -LARGEST < self.low < self.high < LARGEST:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")

    @property
    def address(self) -> str:
        return completions(self.url)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Any) -> Tensor:
        """[N] float32."""
        readings = _ask(self, images, prompts, 1, self._body, lambda asked, reply: [self._number(said(reply))], "scored")
        return _scores(readings)

    def identity(self) -> dict:
        scale = {"low": self.low, "high": self.high, "normalise": self.normalise}
        return {"reward": self.name, "service": self.shown, "model": self.model, "template": self.template,
                "pattern": self.pattern, "max_tokens": self.max_tokens, **scale}

    def _body(self, asked: list[Picture]) -> dict:
        (picture,) = asked
        url = f"data:image/png;base64,{picture.png}"
        content = [{"type": "image_url", "image_url": {"url": url}},
                   {"type": "text", "text": self.template.replace("{prompt}", picture.prompt)}]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": self.max_tokens}

    def _number(self, said: str) -> Reading:
        found = re.findall(self.pattern, said)
        if not found:
            return Reading(None, "no score in the judge's reply")
        try:
            number = float(found[-1])
        except ValueError:
            return Reading(None, "what pattern matched is no number")
        if not self.low <= number <= self.high:
            return Reading(None, f"the judge's score {number:g} lies outside {self.low:g} to {self.high:g}")
        return Reading((number - self.low) / (self.high - self.low) if self.normalise else number)


class Picture(NamedTuple):
    """One picture as it is sent. id: new for every call; png: base64."""

    id: str
    prompt: str
    png: str


def exchange(service: Service, images: Sequence[Any], prompts: Sequence[str], batch_size: int, field: str,
             value: Callable[[Any], Reading]) -> list[Reading]:
    """One Reading a picture over the protocol of this module. field: "score" or "text"; value: judges what the field holds."""
    def read(asked: list[Picture], reply: Any) -> list[Reading]:
        entries = reply.get(f"{field}s") if isinstance(reply, dict) else None
        if not isinstance(entries, list):
            raise Refusal(f'its reply is not {{"{field}s": [...]}}')
        return _by_owner([picture.id for picture in asked], entries, field, value)

    return _ask(service, images, prompts, batch_size, _body, read, "scored" if field == "score" else "read")


def finite(value: Any) -> Reading:
    """A score that float32 can hold; anything else has a reason."""
    if value is None:
        return Reading(None, "the service cannot score it")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Reading(None, "its score is not a number")
    if not -LARGEST <= value <= LARGEST:  # also NaN, and integers beyond any float
        return Reading(None, "its score is not finite")
    return Reading(float(value))


def _body(asked: list[Picture]) -> dict:
    return {"pictures": [picture._asdict() for picture in asked]}


def _by_owner(ids: list[str], entries: list[Any], field: str, value: Callable[[Any], Reading]) -> list[Reading]:
    said: dict[str, list[Reading]] = {name: [] for name in ids}
    for entry in entries:
        owner = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(owner, str) and owner in said:
            said[owner].append(value(entry.get(field)))
    if not any(said.values()):
        raise Refusal("its reply names none of the ids it was sent")
    return [_one(readings, field) for readings in said.values()]


def _one(readings: list[Reading], field: str) -> Reading:
    if not readings:
        return Reading(None, f"its reply has no {field} for it")
    if any(reading != readings[0] for reading in readings):
        return Reading(None, f"its reply has two different {field}s for it")
    return readings[0]


def _ask(service: Service, images: Sequence[Any], prompts: Sequence[str], batch_size: int,
         body: Callable[[list[Picture]], dict], read: Callable[[list[Picture], Any], list[Reading]],
         what: str) -> list[Reading]:
    """Readings in the order of the pictures. One that cannot be decoded is not sent."""
    images = list(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: pass one prompt per picture")
    readings = [Reading(None, "the picture cannot be decoded") for _ in images]
    call = secrets.token_hex(4)
    encoded = {n: png for n, image in enumerate(images) if (png := as_png(image)) is not None}
    batches = [list(encoded)[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    questions = [[Picture(f"{call}-{n}", prompts[n], encoded[n]) for n in batch] for batch in batches]
    answers = service.ask(questions, body, read)
    for batch, answer in zip(batches, answers, strict=True):
        for place, n in enumerate(batch):
            readings[n] = Reading(None, str(answer)) if isinstance(answer, Refusal) else answer[place]
    refused = sum(isinstance(answer, Refusal) for answer in answers)
    report(service, what, [reading.reason for reading in readings], len(answers), refused)
    return readings


def completions(url: str) -> str:
    """Where an OpenAI-style service is posted to, from its base address (or from that very one)."""
    parts = url.partition("?")
    base = parts[0].rstrip("/").removesuffix("/chat/completions")
    return f"{base}/chat/completions{parts[1]}{parts[2]}"


def as_png(image: Any) -> str | None:
    """base64 of the picture as PNG, which loses nothing; None where it cannot be decoded."""
    target = io.BytesIO()
    try:
        as_pil(image).save(target, "PNG", compress_level=1)
    except UNREADABLE:
        return None
    return base64.b64encode(target.getvalue()).decode()


def said(reply: Any) -> str:
    """The text of the first choice of a chat completion, half letters replaced; Refusal where the reply has another form."""
    try:
        said = reply["choices"][0]["message"]["content"]
    except (TypeError, LookupError):
        raise Refusal("its reply is not a chat completion") from None
    return said.encode(errors="replace").decode() if isinstance(said, str) else ""


def _scores(readings: list[Reading]) -> Tensor:
    return torch.tensor([math.nan if reading.value is None else reading.value for reading in readings], dtype=torch.float32)
