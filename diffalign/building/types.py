"""What flows through the building of a preference data set: groups of candidates, and filters that drop some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One picture for a prompt.

    image: its file, relative to the data set's folder and named by the SHA-256 of its bytes, so that a picture is stored once.
    scores: by the reward's name in the recipe; NaN where it could not score. model, seed: what drew it, None for a picture
    that was not drawn here. facts: anything else worth keeping (an edit's instruction, a user).
    """

    image: str
    scores: Mapping[str, float] = field(default_factory=dict)
    model: str | None = None
    seed: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A prompt's candidates, K of them. id: stable over runs, whatever was dropped. utility: [K], higher is better, what the
    trainer will read; NaN leaves a candidate out.
    """

    id: str
    prompt: str
    candidates: tuple[Candidate, ...]
    utility: tuple[float, ...]
    category: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a filter kept, in the order it came. report: JSON-ready counts and shares, for build.json and for people."""

    groups: list[Group]
    report: dict[str, Any]


class Filter(Protocol):
    """A frozen dataclass whose fields are its options. folder: what ``Candidate.image`` is relative to. seed: for draws."""

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept: ...
