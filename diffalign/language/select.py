"""Which texts are learned: the scores of several rewards as one number, thresholds, and the pairs of a group.

Prompt-A-Video's rules (arXiv 2412.15156, released code): a weighted sum of raw scores, with other weights for evolution
than for pairs; strict thresholds a reward; chosen from the first ranks, rejected anything that scores lower by a gap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Scores = Mapping[str, float | None]  # by reward; None where it could not score


@dataclass(frozen=True, kw_only=True)
class Score:
    """weights: by reward, 1 where not named; the score is the weighted sum of raw scores, so they carry the units. above: by
    reward, what must be exceeded. most_words, most_digits: of a text that is learned; null for no limit.
    """

    weights: dict[str, float] = field(default_factory=dict)
    above: dict[str, float] = field(default_factory=dict)
    most_words: int | None = 130
    most_digits: int | None = None

    @property
    def names(self) -> set[str]:
        """Rewards that are named."""
        return {*self.weights, *self.above}

    def __call__(self, scores: Scores) -> float | None:
        """None where a reward that counts has no score."""
        used = {name: self.weights.get(name, 1.0) for name in scores if self.weights.get(name, 1.0) != 0}
        if any(scores[name] is None for name in used):
            return None
        return sum(weight * scores[name] for name, weight in used.items())

    def allows(self, text: str, scores: Scores) -> bool:
        """Whether a text is good enough to be learned."""
        short = self.most_words is None or len(text.split()) <= self.most_words
        plain = self.most_digits is None or len(re.findall(r"\d", text)) <= self.most_digits
        reached = all(scores.get(name) is not None and scores[name] > least for name, least in self.above.items())
        return short and plain and reached


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs among a prompt's candidates, ranked by score. ranks: the first so many may be chosen, if ``score`` allows them.
    gap: the rejected one scores lower by more than this; raw units, as the weights.
    """

    score: Score = Score()
    ranks: int = 2
    gap: float = 0.0

    def __post_init__(self):
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        if self.gap < 0:
            raise ValueError(f"gap must not be negative, got {self.gap}")

    def __call__(self, candidates: Sequence[tuple[str, Scores]]) -> list[tuple[int, int]]:
        """(chosen, rejected) as places in ``candidates``; those without a score are left out. Equals keep their order."""
        values = [self.score(scores) for _, scores in candidates]
        order = sorted((n for n, value in enumerate(values) if value is not None), key=lambda n: -values[n])
        return [(w, l) for rank, w in enumerate(order[:self.ranks]) if self.score.allows(*candidates[w])
                for l in order[rank + 1:] if values[w] - values[l] > self.gap]
