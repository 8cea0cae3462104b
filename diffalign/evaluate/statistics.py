"""Paired statistics of models' scores: win rate with an interval, mean difference, sign test, and one plain sentence.

The unit is the prompt. A prompt's win is its mean over seeds of 1 (the aligned picture scores higher), 1/2 (a tie) or 0.
Intervals are percentile bootstraps over prompts, keyed by a seed, with the percentiles widened for small samples
(Hesterberg 2015, "What teachers should know about the bootstrap", section 4.2: "expanded percentile"). Where several models
are compared with one base, the p-values of the sign tests are corrected by Holm's step-down rule (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load on first use

from .. import rng

LEVEL = 0.95
ERROR = 1 - LEVEL  # chance of calling at least one of several equal models better or worse
TIE = 1e-6  # scores closer than this, absolutely and relatively, are a tie
POWER = 0.8
FEWEST = 6  # prompts won or lost, for a verdict: a clean sweep of five has a two-sided sign test of 2/2^5 = 0.06, of six 0.03


@dataclass(frozen=True, kw_only=True)
class Paired:
    """prompts: prompts with at least one scored pair. pairs = wins + ties + losses, pictures of the same prompt and seed.

    unscored: pairs left out because the judge could not score one side. base_score, aligned_score: means over prompts.
    win_rate, difference (aligned minus base), each with a 95 % bootstrap interval over prompts. sign_test: two-sided p of
    more prompts won than lost, tied prompts ignored. prompts_needed: prompts that would show a win rate like this one in
    four runs of five; None where it is one half, or of one prompt. verdict: "better", "worse" or "undecided" (always
    with fewer than six prompts won or lost, however many are tied).
    """

    prompts: int
    pairs: int
    wins: int
    ties: int
    losses: int
    unscored: int
    base_score: float
    aligned_score: float
    difference: float
    difference_low: float
    difference_high: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    sign_test: float
    prompts_needed: int | None
    verdict: str

    @property
    def sentence(self) -> str:
        """The verdict in plain English."""
        return self.about("aligned model")

    def about(self, name: str) -> str:
        """The verdict on a model called ``name``, in plain English."""
        rate = f"{_percent(self.win_rate)} of {self.prompts:,} prompts"
        interval = f"95% interval {_percent(self.win_rate_low)} to {_percent(self.win_rate_high)}"
        if self.verdict == "better":
            return f"The {name} is better: it wins {rate} ({interval}; ties count half)."
        if self.verdict == "worse":
            return f"The {name} is worse: it wins only {rate} ({interval}; ties count half)."
        open_ = f"No difference is shown at this size: the {name} wins {rate} ({interval}; ties count half)."
        return f"{open_} {self._needs()}"

    def _needs(self) -> str:
        if self.prompts_needed is None:
            return "As many were won as lost." if self.win_rate == 0.5 else "One prompt cannot show a difference."
        if self.win_rate_low > 0.5 or self.win_rate_high < 0.5:
            return f"Fewer than {FEWEST} prompts were won or lost, the others are ties: too few to tell."
        if self.prompts_needed > 100_000:
            return "To tell a difference this small would need more than 100,000 prompts."
        return f"If this win rate is the true one, it needs about {_round(self.prompts_needed):,} prompts to show."


def paired(base: np.ndarray, aligned: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> Paired | None:
    """base, aligned: scores [P, S] of P prompts and S seeds, NaN where the judge could not score -> statistics, or None
    when no pair was scored on both sides.
    """
    base, aligned = np.asarray(base, np.float64), np.asarray(aligned, np.float64)
    if base.shape != aligned.shape or base.ndim != 2:
        raise ValueError(f"scores must be two arrays [prompts, seeds] of one shape, got {base.shape} and {aligned.shape}")
    both = ~(np.isnan(base) | np.isnan(aligned))
    kept = both.any(1)
    if not kept.any():
        return None
    outcome = outcomes(base, aligned)
    rows = np.stack([_mean(x, both)[kept] for x in (outcome, base, aligned)])  # [3, prompts]
    wins, base_mean, aligned_mean = rows.mean(1)
    (low, high), (d_low, d_high) = bootstrap(np.stack([rows[0], rows[2] - rows[1]]), seed=seed, resamples=resamples)
    if np.ptp(rows[0]) == 0:  # resampling shows no spread at all, which is not certainty
        low, high = wilson(float(wins), rows.shape[1])
    won, lost = int((rows[0] > 0.5).sum()), int((rows[0] < 0.5).sum())
    return Paired(
        prompts=int(kept.sum()), pairs=int(both.sum()), unscored=int((~both).sum()),
        wins=int((outcome[both] == 1).sum()), ties=int((outcome[both] == 0.5).sum()), losses=int((outcome[both] == 0).sum()),
        base_score=float(base_mean), aligned_score=float(aligned_mean), difference=float(aligned_mean - base_mean),
        difference_low=d_low, difference_high=d_high, win_rate=float(wins), win_rate_low=low, win_rate_high=high,
        sign_test=float(scipy.stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0,
        prompts_needed=prompts_needed(rows[0]), verdict=_verdict(low, high, won + lost))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: the k-th smallest of m is multiplied by m - k + 1, and none is below a
    smaller one's. Rejecting those below 0.05 errs at all in at most 5 % of studies, however the tests depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [1.0] * len(order), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which of several settings the judge likes best, chosen on the prompts that it is reported for: the figures of the best
    are somewhat too good, since the luckiest of equals is taken.

    scores: mean score by setting. best: the highest (the first of equals). picked: share of resamples of the prompts in which
    each setting comes out best; far below 1 for the best, it might as well have been another.
    """

    scores: dict[str, float]
    best: str
    picked: dict[str, float]


def sweep(scores: dict[str, np.ndarray], *, seed: int = 0, resamples: int = 10_000) -> Sweep | None:
    """scores: [P, S] by setting, NaN where not scored; prompts that a setting has no score for are left out of all.

    None when no prompt is left.
    """
    known = {name: ~np.isnan(values) for name, values in scores.items()}
    rows = np.stack([_mean(np.asarray(values, np.float64), known[name]) for name, values in scores.items()])  # [settings, P]
    rows = rows[:, ~np.isnan(rows).any(0)]
    if not rows.shape[1]:
        return None
    means, names = rows.mean(1), list(scores)
    picked = np.bincount(_resampled(rows, seed, resamples).argmax(1), minlength=len(names)) / resamples
    return Sweep(scores=dict(zip(names, means.tolist(), strict=True)), best=names[int(means.argmax())],
                 picked=dict(zip(names, picked.tolist(), strict=True)))


def outcomes(base: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """1 where aligned scores higher, 0 where lower, 1/2 for a tie, NaN where either is NaN; any shape."""
    tie = np.isclose(aligned, base, rtol=TIE, atol=TIE)
    outcome = np.where(tie, 0.5, np.greater(aligned, base).astype(np.float64))
    return np.where(np.isnan(base) | np.isnan(aligned), np.nan, outcome)


def bootstrap(rows: np.ndarray, *, seed: int, resamples: int) -> list[tuple[float, float]]:
    """95 % intervals of the means of each row of [R, n], resampling the n columns together; deterministic in the seed.

    A row of one value has an interval without width: the caller must know what its spread could have been.
    """
    means = _resampled(rows, seed, resamples)
    tail = expanded_tail(rows.shape[1])
    return [(float(low), float(high)) for low, high in np.quantile(means, [tail, 1 - tail], axis=0).T]


def share_interval(shares: np.ndarray, *, seed: int, resamples: int) -> tuple[float, float]:
    """95 % interval of the mean of shares [n] in [0, 1]: the bootstrap's; Wilson's where all are the same, since resampling
    then shows no spread at all, which is not certainty.
    """
    if np.ptp(shares) == 0:
        return wilson(float(shares[0]), len(shares))
    return bootstrap(shares[None], seed=seed, resamples=resamples)[0]


def _resampled(rows: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of each row of [R, n] over resampled columns, [resamples, R]."""
    count = rows.shape[1]
    draw = rng.generator(seed, "bootstrap")
    block = max(1, 2_000_000 // count)  # keeps a block of resamples below about 50 MB
    parts = []
    for start in range(0, resamples, block):
        picked = draw.integers(0, count, size=(min(block, resamples - start), count))
        parts.append(np.stack([row[picked].mean(1) for row in rows], axis=1))
    return np.concatenate(parts)


def expanded_tail(count: int) -> float:
    """Share of the resampled means left out at each end: 2.5 % for many prompts, less for few."""
    if count < 2:
        return 0.0
    return float(scipy.stats.norm.cdf(-math.sqrt(count / (count - 1)) * scipy.stats.t.ppf(0.5 + LEVEL / 2, count - 1)))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; with ties as halves it is slightly too wide, never too narrow."""
    if count == 0:
        return 0.0, 1.0
    z = float(scipy.stats.norm.ppf(0.5 + LEVEL / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def prompts_needed(wins: np.ndarray) -> int | None:
    """Prompts at which a two-sided 5 % test shows a mean and spread like these with 80 % power. wins: [P] in [0, 1]."""
    effect = abs(float(wins.mean()) - 0.5)
    if effect < 1e-12 or len(wins) < 2:
        return None
    z = float(scipy.stats.norm.ppf(0.5 + LEVEL / 2) + scipy.stats.norm.ppf(POWER))
    return max(FEWEST, math.ceil(float(wins.var(ddof=1)) * (z / effect) ** 2))


def _mean(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Mean over seeds of the kept entries: [P, S] -> [P], NaN where none is kept."""
    count = keep.sum(1)
    return np.where(count > 0, np.where(keep, x, 0).sum(1) / np.maximum(count, 1), np.nan)


def _verdict(low: float, high: float, decided: int) -> str:
    """decided: prompts that are won or lost. Among many ties the bootstrap takes four wins and no loss for certain."""
    if decided < FEWEST:
        return "undecided"
    return "better" if low > 0.5 else "worse" if high < 0.5 else "undecided"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _round(number: int) -> int:
    """Two significant digits: an estimate should not look exact."""
    scale = 10 ** max(0, len(str(number)) - 2)
    return math.ceil(number / scale) * scale
