"""What an objective is: how likely each candidate is, bent into a loss. Imports nothing but torch and the types.

``title_of``, ``needs_scores`` and ``reads_weighting`` are the one place that reads those attributes: a third party's part may
lack them.
"""

from __future__ import annotations

from typing import Protocol

from ..types import Batch, Estimate, Loss, Memory


class Objective(Protocol):
    """Pure: the same estimate, batch and memory give the same loss.

    reference_free: True when no reference is read; the reference pass is then never run. min_k: smallest group it accepts.
    needs_scores: True when the size of the utilities matters, not their order alone; False where absent. title: its name in
    reports; its class's where absent. Optional as well: reads_weighting, False when plain errors are all that is read, which
    ``likelihood.weighting`` does not enter; beta_unit, how many of DPO's beta one of this objective's is, 1 where absent.
    """

    reference_free: bool
    min_k: int
    needs_scores: bool
    title: str

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss: ...


def title_of(part: object) -> str:
    """The name that an objective or a link goes by in reports."""
    return getattr(part, "title", type(part).__name__)


def needs_scores(part: object) -> bool:
    """Whether an objective or its labels read the size of the utilities."""
    return bool(getattr(part, "needs_scores", False))


def reads_weighting(part: object) -> bool:
    """Whether the estimator's weighting reaches the loss."""
    return bool(getattr(part, "reads_weighting", True))
