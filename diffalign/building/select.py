"""What of a judged group goes into the table: all of it, its best and worst, or all its pairs. Ties never become pairs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar, Protocol

from .types import Candidate, Group


class Select(Protocol):
    """Rows of one group, JSON-ready, in a layout that ``data.columns`` reads. table: the file's name.

    min_gap: in units of the utility; what lies closer together is no preference.
    """

    table: ClassVar[str]
    min_gap: float

    def __call__(self, group: Group) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A row per group with all its candidates and their utilities (``images``, ``scores``), in the order they were drawn.

    A group is kept when its best and its worst differ, by ``min_gap`` at least.
    """

    min_gap: float = 0.0
    table = "groups.jsonl"

    def __post_init__(self):
        _check_gap(self.min_gap)

    def __call__(self, group: Group) -> list[dict[str, Any]]:
        if not _apart(max(group.utility) - min(group.utility), self.min_gap):
            return []
        found = group.candidates
        return [{**_head(group), "images": [one.image for one in found], "scores": list(group.utility),
                 **{f"score_{name}": [one.scores[name] for one in found] for name in found[0].scores},
                 "models": [one.model for one in found], "seeds": [one.seed for one in found]}]


@dataclass(frozen=True, kw_only=True)
class BestWorst:
    """One pair a group, the best against the worst (``chosen``, ``rejected``); of equal ones, the first drawn."""

    min_gap: float = 0.0
    table = "pairs.jsonl"

    def __post_init__(self):
        _check_gap(self.min_gap)

    def __call__(self, group: Group) -> list[dict[str, Any]]:
        numbers = range(len(group.utility))
        best, worst = (pick(numbers, key=group.utility.__getitem__) for pick in (max, min))
        return [_pair(group, best, worst)] if _apart(group.utility[best] - group.utility[worst], self.min_gap) else []


@dataclass(frozen=True, kw_only=True)
class AllPairs:
    """A row for every two candidates that differ, the widest gap first; max_pairs: of one group, so that none outweighs."""

    min_gap: float = 0.0
    max_pairs: int | None = None
    table = "pairs.jsonl"

    def __post_init__(self):
        _check_gap(self.min_gap)
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {self.max_pairs}")

    def __call__(self, group: Group) -> list[dict[str, Any]]:
        gaps = {(i, j): group.utility[i] - group.utility[j] for i, j in permutations(range(len(group.utility)), 2)}
        found = sorted((pair for pair, gap in gaps.items() if _apart(gap, self.min_gap)), key=lambda pair: (-gaps[pair], pair))
        return [_pair(group, i, j) for i, j in found[:self.max_pairs]]


SELECTS = {"groups": Groups, "best_worst": BestWorst, "all_pairs": AllPairs}


def _check_gap(gap: float) -> None:
    if gap < 0:
        raise ValueError(f"min_gap must not be negative, got {gap}")


def _apart(gap: float, least: float) -> bool:
    return gap > 0 and gap >= least


def _head(group: Group) -> dict[str, Any]:
    return {"id": group.id, "prompt": group.prompt, **({"category": group.category} if group.category is not None else {})}


def _pair(group: Group, winner: int, loser: int) -> dict[str, Any]:
    gap = group.utility[winner] - group.utility[loser]
    return {**_head(group), **_side("chosen", group.candidates[winner], group.utility[winner]),
            **_side("rejected", group.candidates[loser], group.utility[loser]), "gap": gap}


def _side(side: str, one: Candidate, utility: float) -> dict[str, Any]:
    return {side: one.image, f"{side}_score": utility, **{f"{side}_score_{name}": x for name, x in one.scores.items()},
            f"{side}_model": one.model, f"{side}_seed": one.seed}
