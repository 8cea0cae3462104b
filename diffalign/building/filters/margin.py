"""The simplest filters: how far a group's best and worst candidate lie apart, by its labels or by a reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..types import Group, Kept


def ends(group: Group) -> tuple[int, int] | None:
    """(best, worst) candidate by utility, the first of equals; None where fewer than two have one."""
    known = [place for place, value in enumerate(group.utility) if math.isfinite(value)]
    if len(known) < 2:
        return None
    return max(known, key=group.utility.__getitem__), min(known, key=group.utility.__getitem__)


def ranked(groups: Sequence[Group], dropped: Counter) -> list[tuple[Group, int, int]]:
    """(group, best, worst) of those that say which candidate is better; the others are counted in ``dropped``."""
    found = []
    for group in groups:
        pair = ends(group)
        if pair is None:
            dropped["unscored"] += 1
        elif group.utility[pair[0]] == group.utility[pair[1]]:
            dropped["tie"] += 1
        else:
            found.append((group, *pair))
    return found


def margins(rows: Sequence[tuple[Group, int, int]], reward: str | None) -> np.ndarray:
    """What the reward gives the labelled best above the labelled worst, [N] float64; below 0 it disagrees with the label.

    reward: a name in ``Candidate.scores``; None takes the utility. NaN where it could not score. Raises DataError for a
    reward that no candidate was scored with.
    """
    if reward is None:
        return np.array([group.utility[best] - group.utility[worst] for group, best, worst in rows])
    names = {name for group, *_ in rows for candidate in group.candidates for name in candidate.scores}
    if rows and reward not in names:
        known = ", ".join(sorted(names)) or "none"
        raise DataError(f'no candidate has a score of the reward "{reward}"; scored were: {known}')
    return np.array([_score(group, best, reward) - _score(group, worst, reward) for group, best, worst in rows])


def _score(group: Group, place: int, reward: str) -> float:
    value = group.candidates[place].scores.get(reward, math.nan)
    return value if math.isfinite(value) else math.nan


def disagreement(margin: np.ndarray) -> float | None:
    """Share of pairs whose labelled winner the reward puts below the loser, among those it does not call equal."""
    told = margin[np.isfinite(margin) & (margin != 0)]
    return round(float((told < 0).mean()), 4) if len(told) else None


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Five numbers for a report; None where nothing is known."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    names = ("least", "quarter", "median", "three_quarters", "most")
    return {name: float(f"{value:.6g}") for name, value in zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))}


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Drops groups whose best and worst utility are equal or closer than ``least``, and those with fewer than two scores.

    least: in units of the utility.
    """

    least: float = 0.0

    def __post_init__(self):
        if not 0 <= self.least < math.inf:
            raise ValueError(f"least must be a number from 0, got {self.least}")

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        dropped = Counter(tie=0, unscored=0)
        rows = ranked(groups, dropped)
        gaps = margins(rows, None)
        wide = [group for (group, *_), gap in zip(rows, gaps) if gap >= self.least]
        dropped["tie"] += len(rows) - len(wide)
        return Kept(groups=wide, report={"groups": len(groups), "kept": len(wide), "dropped": dict(dropped),
                                         "gap": spread(gaps)})


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Keeps the groups whose labelled best and worst candidate a reward, the proxy, tells apart by neither too little nor
    too much.

    reward: the proxy's name in the scores; null takes the utility itself. signed: drop pairs where the proxy disagrees with
    the label or sees no difference; else the size of its margin counts, so that the label is kept against the proxy. least:
    smallest margin kept, in the proxy's units. min_quantile, max_quantile: bounds among the margins of the groups that are
    left then; the largest margins are often a broken picture beside a sound one, from which little is learned.
    """

    reward: str | None = None
    signed: bool = False
    least: float = 0.0
    min_quantile: float = 0.0
    max_quantile: float = 1.0

    def __post_init__(self):
        if not 0 <= self.least < math.inf:
            raise ValueError(f"least must be a number from 0, got {self.least}")
        if not 0 <= self.min_quantile < self.max_quantile <= 1:
            raise ValueError("min_quantile and max_quantile must lie in 0..1, min_quantile below max_quantile, got "
                             f"{self.min_quantile} and {self.max_quantile}")

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        dropped = Counter(tie=0, unscored=0)
        rows = ranked(groups, dropped)
        margin = margins(rows, self.reward)
        size = margin if self.signed else np.abs(margin)
        fit = np.isfinite(margin) & (size >= self.least) & ((size > 0) if self.signed else True)
        low, high = np.quantile(size[fit], [self.min_quantile, self.max_quantile]) if fit.any() else (0.0, 0.0)
        kept = fit & (size >= low) & (size <= high)
        unknown = int(np.isnan(margin).sum())
        against = int(((margin <= 0) & np.isfinite(margin)).sum()) if self.signed else 0
        dropped.update(proxy_unknown=unknown, proxy_disagrees=against,
                       small_margin=len(rows) - unknown - against - int(fit.sum()), outside_quantiles=int((fit & ~kept).sum()))
        report = {"groups": len(groups), "kept": int(kept.sum()), "dropped": dict(dropped), "proxy": self.reward or "utility",
                  "margin": spread(margin), "disagreement": disagreement(margin),
                  "kept_disagreement": disagreement(margin[kept])}
        return Kept(groups=[group for (group, *_), keep in zip(rows, kept) if keep], report=report)
