"""Weights of a combined reward from preferences: logistic regression on differences of scores.

P(a is preferred to b) = sigmoid(sum_i w_i (r_i(a) - r_i(b))): no intercept, because swapping the two pictures must swap the
probability. The idea is that of MetaMetrics (arXiv 2410.02381), the fit is convex and has one solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy  # its parts load on first use

from ..errors import DataError
from ..evaluate.files import write_json
from .accuracy import Accuracy, accuracy

FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """rewards: names in order. weights: one each, in log odds per unit of that reward's raw score. pairs: differences that the
    fit read; left_out: those with a score of NaN. accuracy: on prompts the fit did not see (cross-validation over prompts).
    """

    rewards: tuple[str, ...]
    weights: tuple[float, ...]
    pairs: int
    left_out: int
    accuracy: Accuracy

    def save(self, path: Path | str) -> None:
        """The JSON file that the reward kind ``calibrated`` reads."""
        write_json(Path(path), {**asdict(self), "rewards": list(self.rewards), "weights": list(self.weights)})


def fit_calibration(names: Sequence[str], winner: np.ndarray, loser: np.ndarray, prompts: Sequence[str], *,
                    non_negative: bool = True, strength: float = 1.0, seed: int = 0) -> Calibration:
    """winner, loser: raw scores [P, R] of the preferred and the other picture of P pairs; prompts: P texts.

    non_negative: no reward may count against a picture. strength: scikit-learn's C on differences divided by their root mean
    square; smaller shrinks the weights. Raises DataError when fewer than two prompts are left, or a reward never differs.
    """
    winner, loser = np.asarray(winner, np.float64), np.asarray(loser, np.float64)
    if winner.shape != loser.shape or winner.shape != (len(prompts), len(names)):
        raise ValueError(f"scores must be two arrays [{len(prompts)}, {len(names)}], got {winner.shape} and {loser.shape}")
    known = ~np.isnan(winner + loser).any(1)
    x, groups = (winner - loser)[known], _numbered([p for p, k in zip(prompts, known, strict=True) if k])
    if len(set(groups.tolist())) < 2:
        raise DataError(f"a calibration needs scored pairs of at least two prompts, got {len(set(groups.tolist()))}")
    scale = np.sqrt(np.square(x).mean(0))
    if not scale.all():
        raise DataError(f'reward "{names[int(np.argmin(scale))]}" gives both pictures of every pair the same score; leave it '
                        "out")
    margins = np.concatenate([x[test] @ (_fit(x[train] / scale, non_negative, strength) / scale)
                              for train, test in _folds(x, groups)])
    order = np.concatenate([test for _, test in _folds(x, groups)])
    return Calibration(rewards=tuple(names), weights=tuple((_fit(x / scale, non_negative, strength) / scale).tolist()),
                       pairs=len(x), left_out=int((~known).sum()),
                       accuracy=accuracy(margins, np.ones(len(x)), groups[order], seed=seed))


def _fit(x: np.ndarray, non_negative: bool, strength: float) -> np.ndarray:
    """x [P, R], winner minus loser -> weights [R] that minimise |w|^2 / 2 + strength * sum log(1 + exp(-x w))."""
    from sklearn.linear_model import LogisticRegression

    # scikit-learn wants two classes: every pair also the other way round, at half the weight each, which is the same loss
    both, label = np.concatenate([x, -x]), np.repeat([1, 0], len(x))
    model = LogisticRegression(C=strength, fit_intercept=False, tol=1e-8, max_iter=1000)
    weights = model.fit(both, label, sample_weight=np.full(len(both), 0.5)).coef_[0]
    return _bounded(x, strength, weights) if non_negative and (weights < 0).any() else weights


def _bounded(x: np.ndarray, strength: float, start: np.ndarray) -> np.ndarray:
    """The same loss with w >= 0, which scikit-learn does not offer; dropping the negative weights would not be its minimum."""
    def loss(w):
        margin = x @ w
        return w @ w / 2 + strength * np.logaddexp(0, -margin).sum(), w - strength * x.T @ scipy.special.expit(-margin)

    bounds = [(0, None)] * len(start)
    return scipy.optimize.minimize(loss, start.clip(min=0), jac=True, method="L-BFGS-B", bounds=bounds,
                                   options={"ftol": 1e-12}).x


def _folds(x: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import GroupKFold

    return list(GroupKFold(n_splits=min(FOLDS, len(set(groups.tolist())))).split(x, groups=groups))


def _numbered(prompts: Sequence[str]) -> np.ndarray:
    """Equal prompts, equal numbers: [P] int64."""
    return np.unique(np.asarray(prompts), return_inverse=True)[1]
