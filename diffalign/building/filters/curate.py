"""Curation by discrete choice among K, as in self-consuming retraining (arXiv 2407.09499).

Of K pictures of a prompt one is picked with probability softmax(r / temperature): what a person does who keeps one of four.
Retraining on the picks alone ends at the pictures of the highest reward. With a fixed set of real data in every round, and
``synthetic_per_real`` (the paper's lambda) below 1 / (K - 1), the model stays within KL <= -log(1 - lambda (K - 1)) of it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ... import rng
from ...data.columns import Tally, read_rows
from ...data.images import decode
from ...data.spec import DataSpec
from ...errors import DataError
from ..pictures import MAX_PIXELS, store
from ..types import Candidate, Group, Kept

logger = logging.getLogger(__name__)


def pick_probabilities(rewards: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(r / temperature) over the last axis of [..., K], float64; NaN has none (Luce's choice; paper, section 2)."""
    scaled = np.where(np.isfinite(rewards), np.asarray(rewards, np.float64), -np.inf) / temperature
    weight = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def pick(rewards: np.ndarray, gumbel: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The place of argmax(r / temperature + g) in the last axis: a draw from ``pick_probabilities`` for Gumbel noise g."""
    return np.where(np.isfinite(rewards), np.asarray(rewards, np.float64) / temperature + gumbel, -np.inf).argmax(-1)


def divergence_bound(synthetic_per_real: float, k: int) -> float | None:
    """Largest KL to the real data over any number of rounds, in nats: -log(1 - lambda (K - 1)); None from
    lambda = 1 / (K - 1) on, where nothing is promised (paper, the bounded case of mixed retraining)."""
    left = 1 - synthetic_per_real * (k - 1)
    return -math.log(left) if left > 0 else None


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Picks one candidate of each group by softmax(reward / temperature), with noise keyed by the group's id.

    reward: its name in the scores; null takes the utility. temperature: in the reward's units; small is nearly best-of-K.
    standardise: divide the reward by its standard deviation around each group's mean first, so that a temperature means the
    same for any reward. The picked candidate (utility 1) stays with one of the others (utility 0), drawn evenly: a pair for
    a pairwise objective, and its winner alone for objective.kind=sft. facts["pick_probability"] of the picked one is for
    importance weights.
    real: a data set of pairs or groups whose rows are added; synthetic_per_real: at most this many picks for each of its
    rows, and a warning from 1 / (K - 1) on. Without real data repeated rounds collapse.
    """

    reward: str | None = None
    temperature: float = 1.0
    standardise: bool = False
    real: str | None = None
    synthetic_per_real: float | None = None

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if (self.real is None) != (self.synthetic_per_real is None):
            raise ValueError("real and synthetic_per_real go together: rows to mix with, and picks for each of them")
        if self.synthetic_per_real is not None and not 0 < self.synthetic_per_real < math.inf:
            raise ValueError(f"synthetic_per_real must be above 0, got {self.synthetic_per_real}")

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        dropped = Counter(unscored=0, over_share=0)
        rewards = [self._rewards(group) for group in groups]
        if groups and not any(np.isfinite(row).any() for row in rewards):
            raise DataError(f'no candidate has a score of the reward "{self.reward or "utility"}"')
        unit = _spread(rewards) if self.standardise else 1.0
        picked, entropy, sizes = [], [], []
        for group, row in zip(groups, rewards):
            known = int(np.isfinite(row).sum())
            if known < 2:
                dropped["unscored"] += 1
                continue
            chances = pick_probabilities(row / unit, self.temperature)
            entropy.append(float(-(chances[chances > 0] * np.log(chances[chances > 0])).sum()))
            sizes.append(known)
            picked.append(self._choose(group, row / unit, chances, seed))
        real = self._real(folder)
        kept = self._share(picked, len(real), seed)
        dropped["over_share"] = len(picked) - len(kept)
        report = {"groups": len(groups), "kept": len(kept) + len(real), "dropped": dict(dropped),
                  "pick_entropy": _mean(entropy), "even_entropy": _mean([math.log(k) for k in sizes]),
                  **(self._mix(len(kept), len(real), max(sizes, default=1)) if self.real is not None else {})}
        return Kept(groups=kept + real, report=report)

    def _rewards(self, group: Group) -> np.ndarray:
        if self.reward is None:
            return np.array(group.utility, dtype=np.float64)
        return np.array([candidate.scores.get(self.reward, math.nan) for candidate in group.candidates], dtype=np.float64)

    def _choose(self, group: Group, rewards: np.ndarray, chances: np.ndarray, seed: int) -> Group:
        draw = rng.generator(seed, f"curate|{group.id}")
        best = int(pick(rewards, draw.gumbel(size=len(rewards)), self.temperature))
        winner = group.candidates[best]
        winner = replace(winner, facts={**winner.facts, "pick_probability": float(chances[best])})
        others = [place for place in np.flatnonzero(np.isfinite(rewards)) if place != best]
        loser = group.candidates[int(draw.choice(others))]
        return replace(group, candidates=(winner, loser), utility=(1.0, 0.0))

    def _share(self, picked: list[Group], real: int, seed: int) -> list[Group]:
        """floor(lambda n) of the picks; which ones depends on the seed and their ids alone."""
        if self.synthetic_per_real is None:
            return picked
        most = math.floor(self.synthetic_per_real * real)
        order = sorted(picked, key=lambda group: (rng.integer(seed, f"share|{group.id}"), group.id))
        chosen = {group.id for group in order[:most]}
        return [group for group in picked if group.id in chosen]

    def _real(self, folder: Path) -> list[Group]:
        """The real rows as groups, their pictures stored beside the others. Raises DataError as reading a data set does."""
        if self.real is None:
            return []
        found = []
        for row in read_rows(DataSpec(path=self.real), Tally()):
            if len(row.images) < 2:
                raise DataError(f"{row.where}: one picture alone; the real data to mix with must hold pairs or groups")
            candidates = tuple(Candidate(image=store(folder, decode(ref.read(), ref.where, MAX_PIXELS))) for ref in row.images)
            name = hashlib.sha256(f"{row.prompt}|{'|'.join(c.image for c in candidates)}".encode()).hexdigest()[:16]
            found.append(Group(id=f"real-{row.id}-{name}", prompt=row.prompt, candidates=candidates, utility=row.utility))
        if not found:
            raise DataError(f"{self.real}: holds no usable row to mix with (real)")
        return found

    def _mix(self, synthetic: int, real: int, k: int) -> dict:
        ratio = synthetic / real
        bound = divergence_bound(ratio, k)
        if bound is None:
            logger.warning("curate: %d picks of %d candidates for %d real rows: synthetic_per_real %.3g is not below "
                           "1 / (K - 1) = %.3g, so repeated rounds have no bound; lower it", synthetic, k, real, ratio,
                           1 / (k - 1))
        return {"real_rows": real, "synthetic_per_real": round(ratio, 6), "real_share": round(1 / (1 + ratio), 6),
                "bounded": bound is not None, "kl_bound": None if bound is None else round(bound, 6)}


def _spread(rewards: list[np.ndarray]) -> float:
    """Standard deviation of all rewards around their own group's mean; 1 where there is none."""
    around = np.concatenate([row - np.nanmean(row) for row in rewards if np.isfinite(row).any()])
    spread = float(np.nanstd(around))
    return spread if spread > 0 else 1.0


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 6) if values else None
