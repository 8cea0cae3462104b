"""The table of the entrants: Bradley-Terry ratings with intervals, K-sort scores, who won against whom."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..evaluate.ratings import Ratings, Skill, bradley_terry, compare_votes, win_fractions
from .ballots import SKILLS
from .store import Record


@dataclass(frozen=True, kw_only=True)
class Standings:
    """ratings: best first. skills: by model, K-sort. wins: [M, M] share of meetings won, models in the order of ratings.

    votes: ranked ballots. all_bad, skipped: the others. voters, prompts: distinct, in the ranked ones.
    """

    ratings: Ratings
    skills: dict[str, Skill]
    wins: np.ndarray
    votes: int
    all_bad: int
    skipped: int
    voters: int
    prompts: int

    def score(self, model: str) -> float:
        """The conservative K-sort score."""
        return SKILLS.score(self.skills[model])

    def scale(self) -> tuple[float, float]:
        """Ends of the axis that holds every rating and finite interval, in points."""
        values = [x for row in self.ratings.rows for x in (row.rating, row.low, row.high) if math.isfinite(x)]
        low, high = (min(values), max(values)) if values else (1000.0, 1000.0)
        margin = max(10.0, 0.05 * (high - low))
        return low - margin, high + margin


def standings(records: list[Record], models: tuple[str, ...], *, seed: int = 0) -> Standings:
    """models: the gallery's; those of votes on entrants that have left it are added."""
    votes = [record.vote for record in records if record.outcome != "skipped"]
    ranked = [vote for vote in votes if vote.ranks is not None]
    names = tuple(sorted({*models, *(name for vote in votes for name in vote.models)}))
    comparisons = compare_votes(ranked, models=names)
    ratings = bradley_terry(comparisons, seed=seed)
    order = [names.index(row.model) for row in ratings.rows]
    return Standings(ratings=ratings, skills=SKILLS(ranked, names), wins=win_fractions(comparisons)[np.ix_(order, order)],
                     votes=len(ranked), all_bad=len(votes) - len(ranked), skipped=len(records) - len(votes),
                     voters=len({vote.voter for vote in ranked}), prompts=len({vote.prompt for vote in ranked}))
