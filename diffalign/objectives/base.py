"""What an objective is: how likely each candidate is, bent into a loss. Imports nothing but torch and the types."""

from __future__ import annotations

from typing import Protocol

from ..types import Batch, Estimate, Loss, Memory


class Objective(Protocol):
    """Pure: the same estimate, batch and memory give the same loss.

    reference_free: True when no reference is read; the reference pass is then never run. min_k: smallest group it accepts.
    needs_scores: True when the size of the utilities matters, not their order alone. title: its name in reports.
    """

    reference_free: bool
    min_k: int
    needs_scores: bool
    title: str

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss: ...
