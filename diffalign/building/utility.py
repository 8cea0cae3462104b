"""How the scores of several rewards become one number per candidate, inside its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Utility(Protocol):
    """scores: [R, K] float64, rewards by candidates -> [K] float64, higher is better.

    NaN for a candidate that lacks a score which is read; the others are then judged as if it were not there.
    reads: those of the rewards' names that it uses, or a name that it wants and that is not among them.
    """

    def reads(self, names: Sequence[str]) -> tuple[str, ...]: ...

    def __call__(self, scores: np.ndarray, names: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class One:
    """One reward's own score, in its own unit; the others are only written down."""

    reward: str

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return (self.reward,)

    def __call__(self, scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return np.asarray(scores, np.float64)[list(names).index(self.reward)]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Weighted mean of z-scores, each reward's taken inside the group: (r - mean) / std, with the population's std.

    A reward that gives all candidates the same score says nothing and counts 0. weights: by reward, 1 where not named, 0
    leaves one out, below 0 turns one round; they are divided by the sum of their sizes.
    """

    weights: dict[str, float] = field(default_factory=dict)

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in dict.fromkeys((*names, *self.weights)) if self.weights.get(name, 1.0) != 0)

    def __call__(self, scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
        weights = np.array([self.weights.get(name, 1.0) for name in names])
        used = weights != 0
        return _among_scored(scores[used], lambda rows: weights[used] @ _z_scores(rows) / np.abs(weights).sum())


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Share of the duels won, over all opponents and rewards: wins / (R * (K - 1)), 0 to 1; a win is a strictly higher score.

    The judgement of Syn-Pic (RankDPO, arXiv 2410.18013), free of the rewards' scales.
    """

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(names)

    def __call__(self, scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return _among_scored(scores, _vote_shares)


UTILITIES = {"mean": Mean, "votes": Votes, "reward": One}


def utilities(utility: Utility | None, scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[float]:
    """A group's utilities, exact in float32 as the trainer will hold them, so that what is a tie there is one here.

    scores: one mapping per candidate. utility: None for the first reward's own scores.
    """
    table = np.array([[one[name] for one in scores] for name in names], np.float64).reshape(len(names), len(scores))
    return [float(value) for value in (utility or One(reward=names[0]))(table, names).astype(np.float32)]


def _among_scored(scores: np.ndarray, judge) -> np.ndarray:
    """``judge`` over the candidates that every reward could score."""
    result, whole = np.full(scores.shape[1], np.nan), ~np.isnan(scores).any(0)
    if whole.sum() > 1:
        result[whole] = judge(scores[:, whole])
    return result


def _z_scores(scores: np.ndarray) -> np.ndarray:
    # equal scores are compared, not subtracted: their mean may be off by a rounding, which the division would blow up
    spread = np.where(np.ptp(scores, 1) == 0, np.inf, scores.std(1))
    return (scores - scores.mean(1, keepdims=True)) / spread[:, None]


def _vote_shares(scores: np.ndarray) -> np.ndarray:
    rewards, candidates = scores.shape
    wins = (scores[:, :, None] > scores[:, None, :]).sum((0, 2))
    return wins / (rewards * (candidates - 1))
