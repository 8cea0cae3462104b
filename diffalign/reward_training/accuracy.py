"""Accuracy of a reward on labelled pairs, with an interval over prompts, and how far its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load on first use

from ..evaluate.statistics import share_interval

RESAMPLES = 10_000
BINS = 5
TIE = 1e-6  # margins closer to 0 than this are a predicted tie


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """value: mean over prompts of the share of pairs ordered as labelled; a predicted tie counts one half. low, high: 95 %
    bootstrap interval over prompts (Wilson's where every prompt has the same share). labelled ties are left out and counted.
    """

    value: float
    low: float
    high: float
    pairs: int
    prompts: int
    labelled_ties: int


def accuracy(margins: np.ndarray, target: np.ndarray, groups: Sequence[Hashable], *, seed: int = 0) -> Accuracy:
    """margins [P]: first minus second score; target [P]: probability that the first is preferred, 0.5 a tie; groups [P]: the
    prompt (or user) of each pair. A margin of NaN counts as a predicted tie: not scored is not right. Raises ValueError when
    every pair is a tie.
    """
    target = np.asarray(target, np.float64)
    decided = target != 0.5
    shares = prompt_shares(margins, target, groups)
    low, high = share_interval(shares, seed=seed, resamples=RESAMPLES)
    return Accuracy(value=float(shares.mean()), low=low, high=high, pairs=int(decided.sum()), prompts=len(shares),
                    labelled_ties=int((~decided).sum()))


def prompt_shares(margins: np.ndarray, target: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Share of the pairs ordered as labelled, of each prompt with a decided pair, in sorted order, [prompts]. Arguments and
    error as in ``accuracy``.
    """
    margins, target, groups = np.asarray(margins, np.float64), np.asarray(target, np.float64), np.asarray(groups)
    decided = target != 0.5
    if not decided.any():
        raise ValueError("an accuracy needs pairs that are no ties")
    _, number = np.unique(groups[decided], return_inverse=True)
    return np.bincount(number, ordered(margins[decided], target[decided])) / np.bincount(number)


def ordered(margins: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of decided pairs, [P]: 1 for one ordered as labelled, 0 for one ordered the other way, 1/2 for a predicted tie."""
    side = np.where(target > 0.5, margins, -margins)
    return np.where(np.isnan(side) | (abs(side) < TIE), 0.5, side > 0)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """How probabilities and outcomes agree. error: expected calibration error, the mean of |confidence - accuracy| over the
    bins, weighted by their pairs. bins: (mean confidence, accuracy, pairs), confidence = probability of the likelier side.
    log_loss: nats per pair; 0.693 is a coin.
    """

    error: float
    bins: list[tuple[float, float, int]]
    log_loss: float


def calibration(margins: np.ndarray, target: np.ndarray) -> Calibrated:
    """margins [P] in log odds, target [P] as in ``accuracy``; ties and NaN are left out. Bins of equal numbers of pairs."""
    margins, target = np.asarray(margins, np.float64), np.asarray(target, np.float64)
    kept = (target != 0.5) & ~np.isnan(margins)
    side = np.where(target > 0.5, margins, -margins)[kept]
    order = np.argsort(abs(side), kind="stable")
    confidence, right = scipy.special.expit(abs(side))[order], ordered(margins[kept], target[kept])[order]
    bins = [(float(c.mean()), float(r.mean()), len(c))
            for c, r in zip(np.array_split(confidence, BINS), np.array_split(right, BINS), strict=True) if len(c)]
    total = max(1, len(side))
    return Calibrated(error=sum(abs(c - r) * n for c, r, n in bins) / total, bins=bins,
                      log_loss=float(np.logaddexp(0, -side).mean()) if len(side) else float("nan"))
