"""Multi-preference consistent filtering: pairs whose label several rewards bear out (LPO, arXiv 2502.01051)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DataError
from ..types import Group, Kept

# the published strategies, of an aesthetic predictor, the cosine of CLIP and VQAScore; the second is the one that was used
STRATEGIES = {1: {"aesthetic": 0.0, "clip": 0.0, "vqa": 0.0}, 2: {"aesthetic": -0.5, "clip": 0.0, "vqa": 0.0},
              3: {"aesthetic": -1.0, "clip": 0.0, "vqa": 0.0}}
TIES = {"aesthetic": 0.2, "clip": 0.03, "vqa": 0.07}


@dataclass(frozen=True, kw_only=True)
class Consistent:
    """Keeps a group if every reward named sees the labelled best above the labelled worst by at least so much.

    least: reward's name in the candidates' scores -> smallest gap, best minus worst, in that reward's units; below 0 lets it
    disagree a little. ties: the same, largest gap either way, for groups whose best and worst are equal by their label; null
    drops those. strict: gaps must exceed ``least`` and stay below ``ties`` (released code), not reach them (paper). A group
    that a reward could not score is dropped.
    """

    least: dict[str, float] = field(default_factory=lambda: dict(STRATEGIES[2]))
    ties: dict[str, float] | None = None
    strict: bool = False

    def __post_init__(self):
        if not self.least:
            raise ValueError("least names no reward; give name: smallest gap, such as {clip: 0}")
        for name, values in (("least", self.least), ("ties", self.ties or {})):
            low = 0 if name == "ties" else -math.inf
            if not all(math.isfinite(value) and value >= low for value in values.values()):
                raise ValueError(f"{name} must hold numbers{' from 0' if low == 0 else ''}, got {values}")

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        """Raises DataError for a reward that no candidate was scored with."""
        self._check(groups)
        reasons = [self._reason(group) for group in groups]
        kept = [group for group, reason in zip(groups, reasons, strict=True) if reason is None]
        dropped = Counter(reason for reason in reasons if reason is not None)
        return Kept(groups=kept, report={"groups": len(groups), "kept": len(kept), "dropped": dict(sorted(dropped.items()))})

    def _check(self, groups: Sequence[Group]) -> None:
        known = {name for group in groups for candidate in group.candidates for name in candidate.scores}
        lost = next((name for name in (*self.least, *(self.ties or {})) if name not in known), None)
        if groups and lost is not None:
            scored = ", ".join(sorted(known)) or "none"
            raise DataError(f'no candidate has a score of the reward "{lost}"; scored were: {scored}')

    def _reason(self, group: Group) -> str | None:
        """Why a group is dropped, or None."""
        places = [i for i, value in enumerate(group.utility) if math.isfinite(value)]
        if len(places) < 2:
            return "unscored"
        # of equal candidates the first and the last, or a tie would be compared with itself
        best, worst = max(places, key=group.utility.__getitem__), min(reversed(places), key=group.utility.__getitem__)
        tie = group.utility[best] == group.utility[worst]
        if tie and self.ties is None:
            return "tie"
        bounds: Mapping[str, float] = self.ties if tie else self.least
        gaps = {name: self._score(group, best, name) - self._score(group, worst, name) for name in bounds}
        if any(math.isnan(gap) for gap in gaps.values()):
            return "unscored"
        lost = next((name for name, bound in bounds.items() if not self._passes(gaps[name], bound, tie)), None)
        return None if lost is None else f"{'tie ' if tie else ''}{lost}"

    def _passes(self, gap: float, bound: float, tie: bool) -> bool:
        room = bound - abs(gap) if tie else gap - bound
        return room > 0 if self.strict else room >= 0

    def _score(self, group: Group, place: int, name: str) -> float:
        value = group.candidates[place].scores.get(name, math.nan)
        return value if math.isfinite(value) else math.nan
