"""Many models ranked from votes or scores: Bradley-Terry with intervals, K-Sort Arena's skills, and who meets whom next.

Two views of the same votes. Bradley-Terry is the batch answer: the order of votes does not matter, and its intervals are
bootstraps over prompts (or voters), never over votes, because the votes of one prompt or person resemble each other. The
K-wise Bayesian skills of K-Sort Arena (arXiv 2408.14468) are the running answer: cheap after every vote, and what the choice
of the next opponents needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import scipy  # its parts load on first use

from .. import rng
from ..errors import DataError
from .statistics import expanded_tail, outcomes

SCALE = 400 / math.log(10)  # rating points per nat of log-odds: 400 points are odds of ten to one
CENTRE = 1000.0
BLOCK = 20_000_000  # numbers in the largest array of a block of resamples


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One judgement of K pictures of a prompt, each by another model.

    models: K distinct names. ranks: one positive number per model, 1 is best, equal numbers are a tie; None: all were bad,
    which says nothing about who is better. voter: the judge. Raises DataError for anything else.
    """

    prompt: str
    models: tuple[str, ...]
    ranks: tuple[int, ...] | None
    voter: str = ""

    def __post_init__(self):
        if len(self.models) < 2 or len(set(self.models)) != len(self.models):
            raise DataError(f"a vote needs two or more different models, got {list(self.models)}")
        if self.ranks is not None and (len(self.ranks) != len(self.models) or not all(
                isinstance(rank, int) and rank >= 1 for rank in self.ranks)):
            raise DataError(f"a vote on {len(self.models)} models needs as many ranks of 1 or more, got {list(self.ranks)}")


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Pairwise outcomes, kept apart by cluster (what is resampled). C clusters, M models.

    wins: [C, M*M], at i*M + j how often model i beat model j. ties: [C, M*M], the same for ties, at both places.
    """

    models: tuple[str, ...]
    wins: scipy.sparse.csr_array
    ties: scipy.sparse.csr_array

    @property
    def clusters(self) -> int:
        return self.wins.shape[0]

    def total(self, ties: float = 0.5) -> np.ndarray:
        """[M, M]: how often i beat j over all clusters, a tie counting ``ties`` for either side."""
        size = len(self.models)
        return (self.wins.sum(0) + ties * self.ties.sum(0)).reshape(size, size)


def compare_votes(votes: Iterable[Vote], *, cluster: Literal["prompt", "voter"] = "prompt",
                  models: Sequence[str] | None = None) -> Comparisons:
    """A ranking of K is its K(K-1)/2 pairs; votes that found all bad are left out.

    models: all entrants, also those without a vote; None takes those that were voted on, by name.
    """
    votes = [vote for vote in votes if vote.ranks is not None]
    names = tuple(models) if models is not None else tuple(sorted({name for vote in votes for name in vote.models}))
    place = {name: i for i, name in enumerate(names)}
    unknown = {name for vote in votes for name in vote.models} - set(place)
    if unknown:
        raise DataError(f"votes name models that are not among the entrants: {', '.join(sorted(unknown)[:5])}")
    clusters = {name: c for c, name in enumerate(sorted({getattr(vote, cluster) for vote in votes}))}
    wins, ties = [], []
    for vote in votes:
        c, ids = clusters[getattr(vote, cluster)], [place[name] for name in vote.models]
        for a, rank_a in zip(ids, vote.ranks):
            for b, rank_b in zip(ids, vote.ranks):
                if a != b and rank_a <= rank_b:
                    (wins if rank_a < rank_b else ties).append((c, a * len(names) + b))
    shape = (len(clusters), len(names) ** 2)
    return Comparisons(models=names, wins=_counted(wins, shape), ties=_counted(ties, shape))


def compare_scores(scores: np.ndarray, models: Sequence[str]) -> Comparisons:
    """scores: [M, P, S] rewards of M models' pictures on P prompts and S seeds; NaN could not be scored and is left out.

    Every two models are compared on every (prompt, seed), scores within 1e-6 being a tie; the cluster is the prompt.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 3 or len(scores) != len(models) or len(set(models)) != len(models):
        raise ValueError(f"scores must be [models, prompts, seeds] of {len(models)} distinct models, got shape {scores.shape}")
    size, prompts = len(models), scores.shape[1]
    wins, ties = (np.zeros((prompts, size, size)) for _ in range(2))
    for i in range(size):
        outcome = outcomes(scores, scores[i][None])  # [M, P, S]: how picture i did against every other model's
        wins[:, i], ties[:, i] = (outcome == 1).sum(2).T, (outcome == 0.5).sum(2).T
        ties[:, i, i] = 0
    return Comparisons(models=tuple(models), wins=scipy.sparse.csr_array(wins.reshape(prompts, -1)),
                       ties=scipy.sparse.csr_array(ties.reshape(prompts, -1)))


def win_fractions(comparisons: Comparisons) -> np.ndarray:
    """[M, M]: share of the meetings of i and j that i won; NaN where they never met.

    A tie is a meeting that nobody won, so entry (i, j) and entry (j, i) add up to 1 minus the share of ties.
    """
    wins, met = comparisons.total(ties=0), comparisons.total(ties=0.5)
    met = met + met.T
    return np.divide(wins, met, out=np.full_like(wins, np.nan), where=met > 0)


# Bradley-Terry


@dataclass(frozen=True, kw_only=True)
class Rating:
    """rating, low, high: points, 400 to odds of ten to one; the interval is 95 %. meetings: pairs it was part of.

    separable: its votes alone do not bound it (it never lost, never won, or never met the rest, directly or by a chain of
    others). Its rating is then the prior's doing, and low and high are infinite.
    """

    model: str
    rating: float
    low: float
    high: float
    meetings: int
    separable: bool


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """rows: best first. l2: strength of the prior. anchor: the model held at 1000, or None: the mean of all that are not
    separable is 1000. clusters: what was resampled, and how often. samples: [resamples, M], resampled ratings before
    centring, in the order of ``models``.
    """

    rows: tuple[Rating, ...]
    l2: float
    anchor: str | None
    clusters: int
    resamples: int
    models: tuple[str, ...]
    samples: np.ndarray = field(repr=False, compare=False)

    def __getitem__(self, model: str) -> Rating:
        return next(row for row in self.rows if row.model == model)

    def gap(self, first: str, second: str) -> tuple[float, float, float]:
        """(points by which first is ahead of second, low, high of its 95 % interval): no centre is involved."""
        one, two = self[first], self[second]
        if one.separable or two.separable:
            return one.rating - two.rating, -math.inf, math.inf
        i, j = self.models.index(first), self.models.index(second)
        low, high = _interval(self.samples[:, i] - self.samples[:, j], self.clusters)
        return one.rating - two.rating, low, high


def bradley_terry(comparisons: Comparisons, *, l2: float = 0.01, anchor: str | None = None, resamples: int = 1000,
                  seed: int = 0) -> Ratings:
    """P(i beats j) = 1/(1 + 10^((R_j - R_i)/400)), by penalised maximum likelihood; ties are half a win for either side.

    l2: strength of the Gaussian prior, l2/2 * sum of squared ratings in nats. It keeps a model that never lost finite; 0.01
    closes the gap of a 7:3 record by 0.4 of its 147 points (1, as in Music Arena's code, by 28). Intervals: percentile
    bootstrap over the clusters, widened for few of them (see ``statistics``); NaN with fewer than two clusters.
    Raises ValueError for a bad option.
    """
    if not (math.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 must be positive, got {l2}; 1e-6 is almost no prior")
    if anchor is not None and anchor not in comparisons.models:
        raise ValueError(f"anchor must be one of the models, got {anchor!r}")
    wins = comparisons.total()
    loose = separable(wins)
    point = _fit(wins, l2)
    samples = _resampled(comparisons, point, l2, resamples, seed)
    if anchor is not None:
        held = [comparisons.models.index(anchor)]
    else:
        held = np.flatnonzero(~loose) if not loose.all() else np.arange(len(loose))

    def centred(x: np.ndarray) -> np.ndarray:
        return CENTRE + x - x[..., held].mean(-1, keepdims=True)

    point, meetings = SCALE * point, (wins + wins.T).sum(1)
    rating, spread = centred(point) if len(point) else point, centred(samples) if samples.size else samples
    rows = []
    for i, model in enumerate(comparisons.models):
        low, high = (-math.inf, math.inf) if loose[i] else _interval(spread[:, i], comparisons.clusters)
        rows.append(Rating(model=model, rating=float(rating[i]), low=low, high=high, meetings=round(meetings[i]),
                           separable=bool(loose[i])))
    return Ratings(rows=tuple(sorted(rows, key=lambda row: (-row.rating, row.model))), l2=l2, anchor=anchor,
                   clusters=comparisons.clusters, resamples=resamples, models=comparisons.models, samples=samples)


def separable(wins: np.ndarray) -> np.ndarray:
    """wins: [M, M] (ties half) -> [M] bool: models that the votes alone cannot place beside the others.

    A finite maximum of the likelihood exists exactly where everyone leads to everyone by a chain of wins (Ford 1957), so
    these are the models outside the largest such group; all of them where no group is the largest.
    """
    if len(wins) == 0:
        return np.zeros(0, bool)
    _, group = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(wins > 0), directed=True, connection="strong")
    sizes = np.bincount(group)
    if (sizes == sizes.max()).sum() > 1:
        return np.ones(len(wins), bool)
    return group != sizes.argmax()


def _fit(wins: np.ndarray, l2: float) -> np.ndarray:
    """[M, M] -> [M], nats, mean 0: the maximum of the penalised likelihood."""
    total = max(1.0, float(wins.sum()))  # per meeting, so that the tolerance means the same for ten votes and a million
    found = scipy.optimize.minimize(
        lambda r: _objective(wins, r, l2) / total, np.zeros(len(wins)), method="trust-exact",
        jac=lambda r: _slopes(wins, r, l2)[0] / total, hess=lambda r: _slopes(wins, r, l2)[1] / total,
                     options={"gtol": 1e-10}) if len(wins) else None
    # a last step of Newton's own: scipy stops at the tolerance of a gradient, which a weak prior makes a loose one
    return _newton(wins[None], found.x[None], l2)[0] if found is not None else np.zeros(0)


def _objective(wins: np.ndarray, r: np.ndarray, l2: float) -> np.ndarray:
    """wins [..., M, M], r [..., M] -> [...]: minus the log-likelihood and the log-prior, nats."""
    margin = r[..., :, None] - r[..., None, :]
    return -(wins * scipy.special.log_expit(margin)).sum((-2, -1)) + 0.5 * l2 * (r * r).sum(-1)


def _slopes(wins: np.ndarray, r: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Its gradient [..., M] and Hessian [..., M, M]."""
    met = wins + np.swapaxes(wins, -1, -2)
    share = scipy.special.expit(r[..., :, None] - r[..., None, :])
    gradient = (met * share).sum(-1) - wins.sum(-1) + l2 * r
    bend = met * share * (1 - share)
    diagonal = np.arange(r.shape[-1])
    bend[..., diagonal, diagonal] = 0
    hessian = -bend
    hessian[..., diagonal, diagonal] = bend.sum(-1) + l2
    return gradient, hessian


def _newton(wins: np.ndarray, start: np.ndarray, l2: float) -> np.ndarray:
    """[B, M, M], [B, M] -> [B, M]: Newton's steps for all resamples at once; one call of scipy for each would take seconds.

    The objective is strictly convex; a step that does not lower it is halved.
    """
    r, value = start.copy(), _objective(wins, start, l2)
    active = np.arange(len(r))
    for _ in range(100):
        gradient, hessian = _slopes(wins[active], r[active], l2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones(len(active))
        for _ in range(30):
            after = _objective(wins[active], r[active] - size[:, None] * step, l2)
            worse = after > value[active] + 1e-12 * np.abs(value[active])
            if not worse.any():
                break
            size[worse] /= 2
        r[active] -= size[:, None] * step
        value[active] = after
        active = active[np.abs(step).max(-1) > 1e-9]
        if not len(active):
            break
    return r


def _resampled(comparisons: Comparisons, point: np.ndarray, l2: float, resamples: int, seed: int) -> np.ndarray:
    """[resamples, M], points: fits to clusters drawn with replacement; none where a resample could not differ."""
    clusters, size = comparisons.clusters, len(comparisons.models)
    if clusters < 2 or size < 2:
        return np.zeros((0, size))
    draw = rng.generator(seed, "bootstrap")
    table, parts = (comparisons.wins + 0.5 * comparisons.ties).T.tocsr(), []
    block = max(1, BLOCK // max(clusters, size * size))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        times = draw.multinomial(clusters, np.full(clusters, 1 / clusters), size=count)  # [count, C]
        wins = (table @ times.T.astype(np.float64)).T.reshape(count, size, size)
        parts.append(SCALE * _newton(wins, np.repeat(point[None], count, 0), l2))
    return np.concatenate(parts)


def _interval(samples: np.ndarray, clusters: int) -> tuple[float, float]:
    if len(samples) == 0:
        return math.nan, math.nan
    tail = expanded_tail(clusters)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _counted(places: list[tuple[int, int]], shape: tuple[int, int]) -> scipy.sparse.csr_array:
    rows, columns = np.asarray(places, np.int64).reshape(-1, 2).T
    return scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)  # equal places are added up


# K-wise Bayesian skills


@dataclass(frozen=True, kw_only=True)
class Skill:
    """theta ~ N(mu, sigma^2). meetings: pairs that went into it."""

    mu: float
    sigma: float
    meetings: int = 0


@dataclass(frozen=True, kw_only=True)
class KSort:
    """K-wise Bayesian updates of K-Sort Arena (arXiv 2408.14468, section 4); start values are TrueSkill's, as on its board.

    mu, sigma: a new model's skill. beta: spread of a single performance. eta: score = mu - eta * sigma.
    floor: the variance never falls below this share of the old one. The printed update treats the K(K-1)/2 pairs of a
    ranking as independent, which makes it negative from K = 5 on with the start values. full_pairs: how many of its K-1 pairs
    count fully for a model; with more, each counts full_pairs/(K-1). None is the paper's rule; 3 changes nothing up to K = 4
    and keeps the update sound beyond. Ties are not in the paper: here half a win and half a loss, as in ``bradley_terry``.
    """

    mu: float = 25.0
    sigma: float = 25 / 3
    beta: float = 25 / 6
    eta: float = 3.0
    floor: float = 1e-4
    full_pairs: int | None = None

    def __post_init__(self):
        for name in ("sigma", "beta", "floor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.floor >= 1:
            raise ValueError(f"floor must be below 1, got {self.floor}")
        if self.full_pairs is not None and self.full_pairs < 1:
            raise ValueError(f"full_pairs must be at least 1, got {self.full_pairs}")

    @property
    def new(self) -> Skill:
        return Skill(mu=self.mu, sigma=self.sigma)

    def score(self, skill: Skill) -> float:
        """The conservative skill: above it with probability 99.9 % at eta = 3."""
        return skill.mu - self.eta * skill.sigma

    def update(self, skills: Sequence[Skill], ranks: Sequence[int]) -> list[Skill]:
        """skills: [K] before the vote, ranks: [K], 1 is best -> [K] after it. All right-hand sides use the old values."""
        mu, variance = np.asarray([s.mu for s in skills]), np.asarray([s.sigma**2 for s in skills])
        ranks = np.asarray(ranks)
        share = (np.sign(ranks[None] - ranks[:, None]) + 1) / 2  # [K, K]: 1 where i beat q, 1/2 tie, 0 where it lost
        weight = 1.0 if self.full_pairs is None else min(1.0, self.full_pairs / max(1, len(skills) - 1))
        pairs = weight * (1 - np.eye(len(skills)))
        c = np.sqrt(2 * self.beta**2 + variance[:, None] + variance[None])
        x = (mu[:, None] - mu[None]) / c
        push = pairs * (share * mean_shift(x) - (1 - share) * mean_shift(-x)) / c
        shrink = pairs * (share * variance_shift(x) + (1 - share) * variance_shift(-x)) / c**2
        kept = np.maximum(1 - variance * shrink.sum(1), self.floor)
        return [replace(skill, mu=float(m), sigma=float(s), meetings=skill.meetings + len(skills) - 1)
                for skill, m, s in zip(skills, mu + variance * push.sum(1), np.sqrt(variance * kept))]

    def __call__(self, votes: Iterable[Vote], models: Sequence[str] = ()) -> dict[str, Skill]:
        """Skills after these votes, in their order. models: entrants that may have no vote yet."""
        skills = dict.fromkeys(models, self.new)
        for vote in votes:
            if vote.ranks is not None:
                before = [skills.get(model, self.new) for model in vote.models]
                skills.update(zip(vote.models, self.update(before, vote.ranks)))
        return skills


def mean_shift(x: np.ndarray) -> np.ndarray:
    """V(x) = phi(x)/Phi(x), the mean of a unit normal above -x; finite also where Phi underflows."""
    x = np.asarray(x, np.float64)
    return np.exp(-0.5 * x * x - 0.5 * math.log(2 * math.pi) - scipy.special.log_ndtr(x))


def variance_shift(x: np.ndarray) -> np.ndarray:
    """W(x) = V(x) (V(x) + x), in [0, 1]: the share of variance that knowing the winner takes away."""
    v = mean_shift(x)
    return np.clip(v * (v + x), 0.0, 1.0)


def matchmake(scores: np.ndarray, met: np.ndarray, k: int, draw: np.random.Generator, *, alpha: float = 1.0,
              pivot: int | None = None) -> list[int]:
    """scores: [M] conservative skills, met: [M, M] meetings so far -> k places, the pivot first.

    The pivot is the model with the fewest meetings, unless it is given; its opponents are those with the largest
    -|S_i - S_q| + alpha * sqrt(ln n / n_iq): near in skill, or rarely met (K-Sort Arena, section 4.4). The paper prints
    +|S_i - S_q|, against its own text. draw decides between equals.
    """
    scores, met = np.asarray(scores, np.float64), np.asarray(met, np.float64)
    if not 2 <= k <= len(scores):
        raise ValueError(f"k must be at least 2 and at most the number of models, {len(scores)}, got {k}")
    lot = draw.random(len(scores))
    pivot = int(np.lexsort((lot, met.sum(1)))[0]) if pivot is None else pivot
    seen, distance = met[pivot], np.abs(scores - scores[pivot])
    rarity = np.full(len(scores), np.inf)  # never met: before all others, the nearest in skill first
    np.sqrt(np.divide(math.log(max(1.0, met.sum() / 2)), seen, out=rarity, where=seen > 0), out=rarity)
    value = alpha * rarity - distance if alpha else -distance
    order = [int(i) for i in np.lexsort((lot, distance, -value)) if i != pivot]
    return [pivot, *order[:k - 1]]
