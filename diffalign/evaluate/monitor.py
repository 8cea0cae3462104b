"""Validation by pictures while a run trains: what a recipe says about it, and what is made of the pictures' figures.

A fixed small set of prompts and seeds is drawn with the base once and with the current weights every so often. Nothing here
draws: ``run.monitor`` does, and hands over figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..rewards import Reward
from ..sampling.latents import Sampler
from .alarm import Alarm, Limits, alarm
from .compare import trained_on
from .spec import LARGEST
from .statistics import Paired, paired


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """The run ends when the held-out judge's mean hasn't exceeded its best for ``patience`` checks in a row; the base's own is
    the first best.
    """

    patience: int = 3

    def __post_init__(self):
        if not 1 <= self.patience <= LARGEST:
            raise ValueError(f"patience must be at least 1 and at most {LARGEST:,}, got {self.patience}")


@dataclass(frozen=True, kw_only=True)
class MonitorSpec:
    """Pictures of the current weights beside the base's, every ``every`` steps, with the reward-hacking alarm.

    prompts: text file, one prompt a line; null takes evaluate.prompts. max_prompts: how many of them, drawn at random once.
    seeds: pictures a prompt; diversity takes two. judge: a held-out reward; null takes evaluate.judge. reward: what is
    trained on, if it is a reward; null takes source.reward. sampler: how pictures are drawn. limits: of the alarm.

    on_alarm: "stop" saves a checkpoint and ends the run. early_stop: null trains to the end. grid_prompts: rows of
    monitor/step-N.png.
    """

    every: int = 100
    prompts: str | None = None
    max_prompts: int = 32
    seeds: int = 2
    judge: Reward | None = None
    reward: Reward | None = None
    sampler: Sampler = Sampler()
    batch_size: int = 8
    grid_prompts: int = 8
    limits: Limits = Limits()
    on_alarm: Literal["warn", "stop"] = "warn"
    early_stop: EarlyStop | None = None

    def __post_init__(self):
        for name in ("every", "max_prompts", "seeds", "batch_size", "grid_prompts"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST:,}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Side:
    """Figures of one model's pictures of P prompts with S seeds. looks: [statistics, P, S]. spread: [P]. judge, reward:
    [P, S], None where there is none. shown: one picture a prompt for the grid, PNG in base64; empty beyond its rows.
    """

    looks: np.ndarray
    spread: np.ndarray
    judge: np.ndarray | None
    reward: np.ndarray | None
    shown: tuple[str, ...]

    def text(self) -> str:
        """JSON that ``read`` takes back, to the bit."""
        return json.dumps({name: value.tolist() if isinstance(value, np.ndarray) else value
                           for name, value in vars(self).items()})

    @classmethod
    def read(cls, text: str) -> Side:
        tree = json.loads(text)
        arrays = {name: None if tree[name] is None else np.asarray(tree[name], np.float64)
                  for name in ("looks", "spread", "judge", "reward")}
        return cls(shown=tuple(tree["shown"]), **arrays)

    @classmethod
    def merge(cls, parts: Sequence[Side]) -> Side:
        """All prompts of several processes, in the order of ranks."""
        def cat(name, axis=0):
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values, axis)

        return cls(looks=cat("looks", 1), spread=cat("spread"), judge=cat("judge"), reward=cat("reward"),
                   shown=tuple(picture for part in parts for picture in part.shown))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One check. alarm: against the base. wins: of the judge, None without one. figures: for the log."""

    alarm: Alarm
    wins: Paired | None
    figures: dict[str, float]


def see(base: Side, now: Side, spec: MonitorSpec, *, seed: int = 0) -> Seen:
    """base, now: of the same prompts and seeds. A judge that is the reward trained on, or has a part in it, is not held out:
    the alarm then has none."""
    both = {name: None if getattr(base, name) is None else np.stack([getattr(base, name), getattr(now, name)])
            for name in ("looks", "spread", "judge", "reward")}
    held_out = spec.judge is not None and not (spec.reward is not None and trained_on(spec.judge, (spec.reward,)))
    found = alarm(both["looks"], training=both["reward"], judge=both["judge"] if held_out else None, limits=spec.limits,
                  diversity=both["spread"] if np.isfinite(both["spread"]).all(0).any() else None)
    wins = None if both["judge"] is None else paired(*both["judge"], seed=seed, resamples=2000)
    figures = {"alarm": float(found.fired), "shift": max(abs(row.shift) for row in found.statistics)}
    if found.diversity is not None:
        figures["diversity"] = found.diversity.ratio
    if found.training is not None:
        figures["reward"] = found.training.aligned
    if wins is not None:
        figures |= {"judge": wins.aligned_score, "win_rate": wins.win_rate, "win_rate_low": wins.win_rate_low,
                    "win_rate_high": wins.win_rate_high}
    return Seen(alarm=found, wins=wins, figures={name: value for name, value in figures.items() if math.isfinite(value)})


def why_stop(seen: Seen, spec: MonitorSpec, history: Sequence[tuple[int, float]]) -> str | None:
    """A sentence where the run should end, else None. history: (step, judge's mean) of all checks, this one last."""
    if seen.alarm.fired and spec.on_alarm == "stop":
        return seen.alarm.sentence.rstrip(".")
    if spec.early_stop is None or not history:
        return None
    best = max(range(len(history)), key=lambda i: history[i][1])  # the first of equals
    if len(history) - 1 - best < spec.early_stop.patience:
        return None
    step, value = history[best]
    return f"the held-out judge hasn't risen above {value:.4g}, of step {step}, in the last {len(history) - 1 - best} checks"


def with_defaults(spec: MonitorSpec, *, prompts: str | None, judge: Reward | None, reward: Reward | None) -> MonitorSpec:
    """``spec`` with what other sections of the recipe say where it says nothing."""
    return replace(spec, prompts=spec.prompts or prompts, judge=spec.judge if spec.judge is not None else judge,
                   reward=spec.reward if spec.reward is not None else reward)
