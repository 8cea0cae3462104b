"""Health metrics: which side moves, and at which times. Values only, detached; NaN entries are not counted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import BestWorst
from ..objectives.pairs import beside
from ..types import Batch, Estimate

BINS = 5


def health(est: Estimate, batch: Batch) -> dict[str, Tensor]:
    """Per pair [P]: margin (nats per element), accuracy (a margin of 0 is one half), by bin of time, and each side's error.

    Pairs that soft labels leave undecided are not among them: nobody can order them rightly.
    ``win_error_change`` and ``lose_error_change`` are policy minus reference, below 0 when the policy denoises that
    side better: DPO often "wins" by ruining losers, which shows as both changes rising while the margin grows.
    """
    with torch.no_grad():
        labels = batch.labels
        b, w, l = BestWorst()(labels)
        if labels.soft is not None:  # without soft labels, BestWorst pairs no ties
            decided = (labels.utility[b, w] > labels.utility[b, l]).nonzero().squeeze(1)
            b, w, l = b[decided], w[decided], l[decided]
        b, w, l = beside(batch, b, w, l)
        margin = est.log_ratio[b, w] - est.log_ratio[b, l]
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
        metrics = {"margin": margin, "accuracy": accuracy, "win_error": est.error[b, w], "lose_error": est.error[b, l]}
        if est.reference_error is not None:
            change = est.error - est.reference_error
            metrics |= {"win_error_change": change[b, w], "lose_error_change": change[b, l]}
        return {name: value.detach() for name, value in metrics.items()} | _by_bin(accuracy, est.t[b, w])


def _by_bin(accuracy: Tensor, t: Tensor) -> dict[str, Tensor]:
    """accuracy_t0 (nearly clean) ... accuracy_t4 (nearly noise)."""
    index = (t * BINS).long().clamp(0, BINS - 1)
    return {f"accuracy_t{i}": torch.where(index == i, accuracy, torch.nan) for i in range(BINS)}
