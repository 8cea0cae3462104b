"""Who writes new prompts in an evolution: the rewriter itself, or a stronger model behind a chat address."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import rng
from ..building.chat import Chat, check_template, fill
from ..rewards.service import Refusal
from .rewriter import Rewriter, Writer, tidy

PROPOSE = (
    "You write prompts for a text-to-image model. Below are the user's prompt (number 0) and the best prompts so far, with "
    "the scores that their pictures got; higher is better. Write {count} new prompts that should score higher. Keep all that "
    "the user asked for and add nothing that contradicts it. At most 6 sentences each.\n"
    "Reply with {count} lines, each a number, a full stop and one prompt, and nothing else.\n"
    "{history}")


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a proposer is shown of one prompt. best: (text, scores by reward), the highest first. round: 1 for the first."""

    prompt: str
    own: dict[str, float | None]
    best: tuple[tuple[str, dict[str, float | None]], ...]
    round: int


class Proposing(Protocol):
    def __call__(self, asked: Sequence[Past], count: int) -> list[list[str]]:
        """At most ``count`` texts for each; none where no answer could be read."""


class Proposer(Protocol):
    """A proposer's options. check() raises a UserError. identity(): JSON-ready. open(): loads what it needs; ``rewriter``
    is the recipe's.
    """

    def check(self) -> None: ...

    def identity(self) -> dict[str, Any]: ...

    def open(self, rewriter: Rewriter, device: torch.device, seed: int) -> Proposing: ...


@dataclass(frozen=True, kw_only=True)
class OwnWords:
    """The recipe's rewriter samples rewrites of the user's prompt and of the best texts so far, in turn. It reads no scores:
    what it has from them is whom to start from.
    """

    def check(self) -> None:
        """Nothing of its own."""

    def identity(self) -> dict[str, Any]:
        return {"kind": "rewriter"}

    def open(self, rewriter: Rewriter, device: torch.device, seed: int) -> Proposing:
        writer = Writer(rewriter, device)

        def propose(asked: Sequence[Past], count: int) -> list[list[str]]:
            parents = [[past.prompt, *(text for text, _ in past.best if text != past.prompt)] for past in asked]
            told = [own[n % len(own)] for own in parents for n in range(count)]
            prompts = "|".join(past.prompt for past in asked)
            texts = writer.sample(told, rng.integer(seed, f"rewrite|{prompts}", asked[0].round) % 2**32)
            return [texts[n:n + count] for n in range(0, len(texts), count)]

        return propose


@dataclass(frozen=True, kw_only=True)
class ChatProposer(Chat):
    """A strong language model that sees the best texts and their scores (the published recipe asked GPT-4o). template: the
    question, with {count} and {history}.
    """

    max_tokens: int = 1024
    template: str = PROPOSE

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template, "count", "history")

    def check(self) -> None:
        """Nothing that can be told without asking."""

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "template": self.template}

    def open(self, rewriter: Rewriter, device: torch.device, seed: int) -> Proposing:
        return self._propose

    def _propose(self, asked: Sequence[Past], count: int) -> list[list[str]]:
        """Raises ServiceError when the service answered none."""
        questions = [(fill(self.template, {"count": str(count), "history": _history(past)}), None) for past in asked]
        return [[] if isinstance(reply, Refusal) else _numbered(reply)[:count] for reply in self.replies(questions)]


def _history(past: Past) -> str:
    shown = enumerate([(past.prompt, past.own), *past.best])
    return "\n".join(f"{n}. [{text}] {_scores(scores)}" for n, (text, scores) in shown)


def _scores(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'unknown' if value is None else f'{value:.3f}'}" for name, value in scores.items())


def _numbered(reply: str) -> list[str]:
    """The prompts of a numbered list, in order."""
    return [text for line in reply.splitlines() if (m := re.match(r"\s*\d+[.)]\s+(.+)", line)) and (text := tidy(m[1]))]


PROPOSERS = {"rewriter": OwnWords, "chat": ChatProposer}
