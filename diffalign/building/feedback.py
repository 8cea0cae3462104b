"""Who says what is wrong with a picture, and which edits would mend it: the first two stages of rich feedback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ..rewards.service import Refusal
from .chat import Chat, check_template, fill

LONGEST = 300  # characters of one instruction: an editor reads 77 tokens

CRITIQUE = (
    "You are shown a picture that was generated for the caption below. Say what a careful viewer would criticise: parts of "
    "the caption that are missing or wrong, and visual faults such as broken shapes, wrong anatomy, unreadable text or "
    "artefacts. For each, say where in the picture it is seen. Invent nothing.\n"
    "End with one line, either 'Verdict: faults' or 'Verdict: none'.\n"
    "Caption: [{prompt}]")

INSTRUCT = (
    "The picture was generated for the caption below and was criticised. Write the edits that would mend it, for an editor "
    "that follows short commands such as 'make the dog brown'. At most {most}, each one imperative sentence about something "
    "that is seen; none may contradict the caption or add what it does not mention.\n"
    "Reply with a JSON list of texts and nothing else; [] if nothing needs an edit.\n"
    "Caption: [{prompt}]\n"
    "Criticism: [{critique}]")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer. again: it was not given (another run may get one); else it was given and cannot be read."""

    reason: str
    again: bool = False


class Critic(Protocol):
    """N prompts and pictures -> N critiques in free text, or Failure. identity(): JSON-ready facts that pin them; where it is
    left out, the fields do.
    """

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[str | Failure]: ...


class Instructor(Protocol):
    """N prompts, pictures and critiques -> N lists of edits, or Failure; an empty list says that nothing is wrong."""

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image],
                 critiques: Sequence[str]) -> list[list[str] | Failure]: ...


@dataclass(frozen=True, kw_only=True)
class ChatCritic(Chat):
    """A vision-language model's critique. template: the question, with {prompt}; the reply must end in a verdict, "faults" or
    "none", which shows that it was understood and is whole.
    """

    template: str = CRITIQUE

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template, "prompt")

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[str | Failure]:
        """Raises ServiceError when the service answered none."""
        questions = [(fill(self.template, {"prompt": prompt}), image) for prompt, image in zip(prompts, images, strict=True)]
        return [_read(reply, _critique) for reply in self.replies(questions)]

    def identity(self) -> dict:
        return {**super().identity(), "template": self.template}


@dataclass(frozen=True, kw_only=True)
class ChatInstructor(Chat):
    """A model's edits for a critique, as a JSON list. template: with {prompt}, {critique} and {most}. most: edits a picture;
    a longer list cannot be read. show_picture: false for a model that sees none.
    """

    template: str = INSTRUCT
    most: int = 3
    show_picture: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template, "prompt", "critique")
        if self.most < 1:
            raise ValueError(f"most must be at least 1 edit, got {self.most}")

    def __call__(self, prompts: Sequence[str], images: Sequence[Image.Image],
                 critiques: Sequence[str]) -> list[list[str] | Failure]:
        """Raises ServiceError when the service answered none."""
        questions = [(fill(self.template, {"prompt": prompt, "critique": critique, "most": str(self.most)}),
                      image if self.show_picture else None)
                     for prompt, image, critique in zip(prompts, images, critiques, strict=True)]
        return [_read(reply, self._edits) for reply in self.replies(questions)]

    def identity(self) -> dict:
        return {**super().identity(), "template": self.template, "most": self.most, "show_picture": self.show_picture}

    def _edits(self, reply: str) -> list[str] | Failure:
        fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", reply, re.DOTALL)
        try:
            edits = json.loads(fenced[1] if fenced else reply)
        except (ValueError, RecursionError):
            return Failure(reason="the edits are no JSON")
        if not isinstance(edits, list) or len(edits) > self.most:
            return Failure(reason=f"the edits are no list of at most {self.most}")
        if not all(isinstance(edit, str) and 0 < len(edit.strip()) <= LONGEST and edit.isprintable() for edit in edits):
            return Failure(reason=f"an edit is no line of 1 to {LONGEST} characters")
        return [edit.strip() for edit in edits]


def _critique(reply: str) -> str | Failure:
    found = re.search(r"\bVerdict:[\s*]*(faults|none)\b[\s.*]*\Z", reply, re.IGNORECASE)
    return reply.strip() if found else Failure(reason="the critique does not end in a verdict")


def _read(reply: str | Refusal, read: Callable[[str], Any]) -> Any:
    return Failure(reason=str(reply), again=True) if isinstance(reply, Refusal) else read(reply)


CRITICS = {"chat": ChatCritic}
INSTRUCTORS = {"chat": ChatInstructor}
