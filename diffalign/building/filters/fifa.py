"""FiFA (arXiv 2410.10166): the few pairs with a wide margin, a good prompt, and prompts that differ from one another.

The objective: over subsets S of K pairs, maximise

    sum of m_i  +  alpha * sum of q(c_i)  +  gamma * sum over the prompts of S of log |e(c) - e(c)'s k-th neighbour in S|

with the margin m, the text quality q and, as the entropy of the prompts, the k-nearest-neighbour estimate up to constants
(Kozachenko and Leonenko). The published approximation takes neighbours among all prompts instead of S: then each pair has
a score of its own, and the K largest are taken. The paper's alpha, gamma, k, K and scales of the terms are not known; here
every term is brought to one scale first. Distances are between distinct prompts: among rows, the nearest neighbour of a
prompt with two pairs is itself, at log 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...data.columns import normalised
from ...errors import ConfigError, DataError
from ..types import Group, Kept
from .margin import disagreement, margins, ranked, spread
from .text import Embedder, Ngrams, Quality, Rules, remembered

GREEDY = 1000  # pairs that the greedy search may select: its time grows with their square
NEAREST = 1e-6  # distances below it, of embeddings of about unit length, are the noise of their arithmetic
Scale = Callable[[np.ndarray], np.ndarray]


def knn_distances(embeddings: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each row of [N, D] to its k-th nearest among the distinct rows: (distance [N], which [N]).

    which: rows that are equal, to six decimals, have the same number and count as one. With fewer than k others the farthest
    one counts; a single point has distance NaN.
    """
    from sklearn.neighbors import NearestNeighbors

    points, which = _distinct(embeddings)
    count = points.shape[0]
    if count < 2:
        return np.full(len(which), np.nan), which
    search = NearestNeighbors(n_neighbors=min(k, count - 1)).fit(points)
    distance, _ = search.kneighbors()  # without a query the point itself is left out
    return np.maximum(distance[which, -1], NEAREST), which


def _distinct(embeddings: Any) -> tuple[Any, np.ndarray]:
    """The distinct rows, first seen first, and for each row its number among them."""
    from scipy import sparse

    seen: dict[bytes, int] = {}
    rows, which = [], np.empty(embeddings.shape[0], dtype=np.int64)
    points = sparse.csr_matrix(embeddings) if sparse.issparse(embeddings) else np.asarray(embeddings, dtype=np.float64)
    for number in range(points.shape[0]):
        row = points[number]
        if sparse.issparse(row):
            row.sort_indices()
            key = row.indices.tobytes() + np.round(row.data, 6).tobytes()
        else:
            key = (np.round(row, 6) + 0.0).tobytes()  # + 0.0: -0 is 0
        if key not in seen:
            seen[key] = len(rows)
            rows.append(number)
        which[number] = seen[key]
    return points[rows], which


def scale(values: np.ndarray, how: str) -> Scale:
    """A map to a common scale, fitted to the known ones of ``values``, that can be applied to other values too.

    none: as they are. minmax: to 0..1. z: mean 0, standard deviation 1 (of the population). rank: the share of the values
    that lie below, equal ones (up to rounding) counted half. A term without any spread becomes 0.
    """
    known = np.sort(values[np.isfinite(values)])
    if how == "none":
        return lambda x: x
    if not len(known) or known[0] == known[-1]:
        return np.zeros_like
    if how == "minmax":
        return lambda x: (x - known[0]) / (known[-1] - known[0])
    if how == "z":
        return lambda x: (x - known.mean()) / known.std()
    # a distance among the selected is often one of those fitted, computed another way: its last bits must not change its rank
    near = 1e-9 * (known[-1] - known[0])
    return lambda x: np.where(np.isnan(x), np.nan, (np.searchsorted(known, x - near)
                                                    + np.searchsorted(known, x + near, "right")) / (2 * len(known)))


@dataclass(frozen=True, kw_only=True)
class Fifa:
    """Keeps the ``keep`` most useful pairs (a group's labelled best and worst): wide margin, good prompt, unlike the others.

    keep: a count, or a share of the groups when it is a fraction (0.005) or 1.0. reward: the proxy behind the margin, by its
    name in the scores; null takes the utility. signed: drop pairs where the proxy disagrees with the label; else the margin's
    size counts. margin_weight, quality_weight (alpha), diversity_weight (gamma), k: of the objective above. normalise: how
    each term is scaled before the weights ("none", "minmax", "z", "rank"), margins over pairs, the others over distinct
    prompts. least_quality: prompts below it are dropped whatever else they offer; gibberish is far from everything.
    max_per_prompt: pairs of one prompt at most; a prompt's pairs have equal quality and diversity. selection: "scores" is the
    published approximation; "greedy" adds, pair by pair, what raises the objective most, for at most 1000 pairs. Equal
    scores go by id. A quality that is unknown drops the pair where quality matters.
    """

    keep: int | float
    reward: str | None = None
    signed: bool = False
    margin_weight: float = 1.0
    quality_weight: float = 0.5
    diversity_weight: float = 0.5
    k: int = 1
    normalise: Literal["none", "minmax", "z", "rank"] = "z"
    least_quality: float | None = None
    max_per_prompt: int = 1
    selection: Literal["scores", "greedy"] = "scores"
    embedder: Embedder = Ngrams()
    quality: Quality = Rules()

    def __post_init__(self):
        share = isinstance(self.keep, float)
        if not (0 < self.keep <= 1 if share else self.keep >= 1):
            raise ValueError(f"keep must be a count from 1 or a share in 0..1, got {self.keep}")
        for name in ("margin_weight", "quality_weight", "diversity_weight"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")
        for name in ("k", "max_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check(self) -> None:
        """Raises a UserError for an embedder or a quality that cannot be used, as far as can be told without loading it."""
        for part in (self.embedder, self.quality):
            if hasattr(part, "check"):
                part.check()

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        dropped = Counter(tie=0, unscored=0)
        # in the order of ids, so that neither sums nor ties depend on the order of the rows
        rows = sorted(ranked(groups, dropped), key=lambda row: row[0].id)
        _refuse_twins(rows)
        margin = margins(rows, self.reward)
        terms = self._terms(rows, margin, folder)
        fit = self._fit(margin, terms, dropped)
        budget = max(1, round(self.keep * len(groups))) if isinstance(self.keep, float) else self.keep
        chosen = self._greedy(terms, fit, budget) if self.selection == "greedy" else self._top(terms, fit, budget)
        dropped["not_selected"] = int(fit.sum()) - len(chosen)
        kept = {rows[place][0].id for place in chosen}
        return Kept(groups=[group for group in groups if group.id in kept],
                    report={"groups": len(groups), "kept": len(chosen), "dropped": dict(dropped),
                            **self._report(rows, margin, terms, chosen)})

    def _terms(self, rows: list[tuple[Group, int, int]], margin: np.ndarray, folder: Path) -> _Terms:
        words = [normalised(group.prompt) for group, *_ in rows]
        spoken = {word: group.prompt for word, (group, *_) in zip(reversed(words), reversed(rows))}  # the first id's spelling
        unique = sorted(spoken)
        place = {word: number for number, word in enumerate(unique)}
        of_row = np.array([place[word] for word in words], dtype=np.int64)
        prompts = [spoken[word] for word in unique]
        quality = remembered(self.quality, prompts, folder) if self._needs_quality else np.zeros(len(prompts))
        if self.diversity_weight and prompts:
            points = self.embedder(prompts)
            distance, which = knn_distances(points, self.k)
        else:
            points, distance, which = None, np.full(len(prompts), np.nan), np.arange(len(prompts))
        logs = np.log(distance)
        size = margin if self.signed else np.abs(margin)
        fitted = {"margin": scale(size, self.normalise), "quality": scale(quality, self.normalise),
                  "diversity": scale(logs[np.unique(which, return_index=True)[1]], self.normalise)}
        # one prompt alone, or no weight: nothing to be far from
        diverse = np.nan_to_num(fitted["diversity"](logs))
        own = self.margin_weight * fitted["margin"](size)
        if self.quality_weight:
            own = own + self.quality_weight * fitted["quality"](quality)[of_row]
        return _Terms(own=own, score=own + self.diversity_weight * diverse[of_row], prompt=which[of_row], logs=logs[of_row],
                      quality=quality[of_row], points=points, of_row=of_row, diversity=fitted["diversity"])

    @property
    def _needs_quality(self) -> bool:
        return bool(self.quality_weight) or self.least_quality is not None

    def _fit(self, margin: np.ndarray, terms: _Terms, dropped: Counter) -> np.ndarray:
        """Which rows may be chosen at all, [N] bool. Rules come after scaling, so that they move nobody else's score."""
        rules = {"proxy_unknown": np.isnan(margin)}
        if self.signed:
            rules["proxy_disagrees"] = margin <= 0
        if self._needs_quality:
            rules["quality_unknown"] = np.isnan(terms.quality)
        if self.least_quality is not None:
            rules["low_quality"] = terms.quality < self.least_quality
        fit = np.ones(len(margin), dtype=bool)
        for name, broken in rules.items():
            dropped[name] = int((fit & broken).sum())
            fit &= ~broken
        return fit

    def _top(self, terms: _Terms, fit: np.ndarray, budget: int) -> list[int]:
        """The ``budget`` highest scores, at most ``max_per_prompt`` of a prompt."""
        taken, chosen = Counter(), []
        for place in np.argsort(-terms.score, kind="stable"):  # rows are in the order of ids: equals go by id
            if len(chosen) == budget:
                break
            if fit[place] and taken[terms.prompt[place]] < self.max_per_prompt:
                taken[terms.prompt[place]] += 1
                chosen.append(int(place))
        return chosen

    def _greedy(self, terms: _Terms, fit: np.ndarray, budget: int) -> list[int]:
        if min(budget, int(fit.sum())) > GREEDY:
            raise ConfigError(f"selection: greedy is for at most {GREEDY} pairs, and keep asks for {budget} of {fit.sum()}; "
                              "use selection=scores, or keep fewer")
        search = _Search(self, terms, fit)
        while len(search.chosen) < budget and search.step():
            pass
        return search.chosen

    def entropy(self, distances: np.ndarray, terms: _Terms) -> np.ndarray:
        """The weighted diversity of prompts at these distances from their k-th neighbours, any shape; 0 without any."""
        return self.diversity_weight * np.nan_to_num(terms.diversity(np.log(np.maximum(distances, NEAREST))))

    def objective(self, terms: _Terms, chosen: Sequence[int]) -> float:
        """The objective's value of a selection, neighbours taken within it."""
        own = float(terms.own[list(chosen)].sum())
        if terms.points is None or not len(chosen):
            return own
        prompts, first = np.unique(terms.prompt[list(chosen)], return_index=True)
        distance, _ = knn_distances(terms.points[terms.of_row[[chosen[i] for i in first]]], self.k)
        return own + float(self.entropy(distance, terms).sum())

    def _report(self, rows: list, margin: np.ndarray, terms: _Terms, chosen: list[int]) -> dict:
        quality = {}
        if self._needs_quality:
            quality = {"quality": spread(terms.quality), "kept_quality": spread(terms.quality[chosen])}
        return {"prompts": len(set(terms.prompt.tolist())), "kept_prompts": len(set(terms.prompt[chosen].tolist())),
                "proxy": self.reward or "utility", "disagreement": disagreement(margin),
                "kept_disagreement": disagreement(margin[chosen]), "margin": spread(np.abs(margin)),
                "kept_margin": spread(np.abs(margin[chosen])), **quality, "log_distance": spread(terms.logs),
                "kept_log_distance": spread(terms.logs[chosen]), "objective": float(f"{self.objective(terms, chosen):.9g}")}


@dataclass(frozen=True)
class _Terms:
    """Of N rows in the order of ids. own: weighted margin and quality; score: with the approximate diversity; prompt: number
    of its distinct embedding; logs: log-distance among all prompts; points: embeddings of the prompts, ``of_row`` says
    which is whose; diversity: how log-distances are scaled."""

    own: np.ndarray
    score: np.ndarray
    prompt: np.ndarray
    logs: np.ndarray
    quality: np.ndarray
    points: Any
    of_row: np.ndarray
    diversity: Scale


class _Search:
    """The greedy selection: near[j] are the k smallest distances of the j-th chosen prompt to the other chosen ones."""

    def __init__(self, spec: Fifa, terms: _Terms, fit: np.ndarray):
        self.spec, self.terms, self.open = spec, terms, fit.copy()
        self.chosen: list[int] = []
        self.taken: Counter = Counter()
        self.columns: list[np.ndarray] = []  # distance of every row to each chosen prompt
        self.near = np.zeros((0, spec.k))    # [chosen prompts, k], sorted; infinite where there are fewer others

    def step(self) -> bool:
        """Take the row that raises the objective most; False when none is left."""
        if not self.open.any():
            return False
        gain = np.where(self.open, self.terms.own + self._diversity_gain(), -np.inf)
        best = int(gain.argmax())  # the first of equals: the smallest id
        prompt = self.terms.prompt[best]
        self.taken[prompt] += 1
        self.chosen.append(best)
        self.open[best] = False
        if self.taken[prompt] >= self.spec.max_per_prompt:
            self.open &= self.terms.prompt != prompt
        if self.taken[prompt] == 1 and self.terms.points is not None:
            self._join(best)
        return True

    def _diversity_gain(self) -> np.ndarray:
        """[N]: what a row adds to the diversity of the selection. A prompt's second pair adds none."""
        if not self.columns:
            return np.zeros(len(self.terms.own))
        to = np.stack(self.columns, axis=1)  # [N, chosen prompts]
        last = min(self.spec.k, to.shape[1]) - 1
        own = np.partition(to, last, axis=1)[:, last]
        before = self._kth(self.near)
        # a newcomer pushes the k-th out of a full list, and lengthens one that is not full
        inner = self.near[:, -2] if self.spec.k > 1 else np.zeros(len(self.near))
        full = np.isfinite(self.near[:, -1])
        after = np.where(full, np.minimum(before, np.maximum(inner, to)), np.fmax(before, to))
        change = self.spec.entropy(own, self.terms) + (self.spec.entropy(after, self.terms)
                                                       - self.spec.entropy(before, self.terms)).sum(1)
        again = np.isin(self.terms.prompt, list(self.taken))
        return np.where(again, 0.0, change)

    @staticmethod
    def _kth(near: np.ndarray) -> np.ndarray:
        """The largest finite of [..., k] sorted distances: the k-th, or the farthest of fewer; NaN without any."""
        count = np.isfinite(near).sum(-1)
        last = np.take_along_axis(near, np.maximum(count - 1, 0)[..., None], -1)[..., 0]
        return np.where(count > 0, last, np.nan)

    def _join(self, row: int) -> None:
        from sklearn.metrics.pairwise import euclidean_distances

        points, own = self.terms.points, self.terms.of_row[row]
        column = euclidean_distances(points, points[own:own + 1])[:, 0][self.terms.of_row]
        to = np.array([other[row] for other in self.columns])
        rest = np.full(self.spec.k, np.inf)
        rest[:min(len(to), self.spec.k)] = np.sort(to)[:self.spec.k]
        if len(self.near):
            self.near = np.sort(np.concatenate([self.near, to[:, None]], axis=1), axis=1)[:, :self.spec.k]
        self.near = np.concatenate([self.near, rest[None]])
        self.columns.append(column)


def _refuse_twins(rows: list[tuple[Group, int, int]]) -> None:
    for one, other in zip(rows, rows[1:]):
        if one[0].id == other[0].id:
            raise DataError(f'two groups have the id "{one[0].id}"; ids must be unique, or the choice depends on the order')
