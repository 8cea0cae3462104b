"""What a run carries from step to step, and what it hands back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..types import Memory

Report = dict[str, tuple[float, float]]  # name -> (sum, count) over all processes, NaN entries not counted


class Window:
    """Sums and counts since the last log line, so that a mean weighs every pair alike. Part of a checkpoint."""

    def __init__(self, values: dict[str, Iterable[float]] | None = None):
        self.values = {name: (total, count) for name, (total, count) in (values or {}).items()}

    def add(self, report: Report) -> None:
        for name, (total, count) in report.items():
            old = self.values.get(name, (0.0, 0.0))
            self.values[name] = (old[0] + total, old[1] + count)

    def means(self) -> dict[str, float]:
        return means(self.values)

    def clear(self) -> None:
        self.values = {}


def means(report: Report) -> dict[str, float]:
    """Sum over count, by sorted name; names without a count, or without a finite mean, are left out."""
    values = {name: total / count for name, (total, count) in sorted(report.items()) if count > 0}
    return {name: value for name, value in values.items() if math.isfinite(value)}


@dataclass
class RunState:
    """step: optimizer steps done. samples: groups (pairs) seen by all processes. updates: steps that moved the weights
    (float16 may skip some). seconds: of training, over all resumes. learning_rate: of the last step. validation_end: the
    last validation, made at step ``validated``. stopped: why a monitor ended the run, None while it goes on."""

    step: int = 0
    samples: int = 0
    updates: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    memory: Memory = field(default_factory=Memory)
    window: Window = field(default_factory=Window)
    validation_start: dict[str, float] = field(default_factory=dict)
    validation_end: dict[str, float] = field(default_factory=dict)
    validated: int | None = None
    stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a monitor saw. figures: for the log. said: a line for people. stop: why the run should end, or None."""

    figures: dict[str, float]
    said: str
    stop: str | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What ``fit`` returns, resumed or not. initial_loss: mean loss of the first micro-batch before any step (None where a
    checkpoint of an older version does not say). metrics: means of the last steps. validation_start, validation_end: what
    ``validation`` returned at both ends. stopped: why a monitor ended the run before its last step, else None."""

    step: int
    samples: int
    seconds: float
    groups_per_step: int
    parameters: int
    initial_loss: float | None
    metrics: dict[str, float]
    validation_start: dict[str, float]
    validation_end: dict[str, float]
    stopped: str | None = None
