"""Validation by pictures while a run trains: what a recipe says about it, and what is made of the pictures' figures.

A fixed small set of prompts and seeds is drawn with the base once and with the current weights every so often. Nothing here
draws: ``run.monitor`` does, and hands over figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..rewards import Reward
from ..sampling.latents import Sampler
from .alarm import Alarm, Limits
from .compare import trained_on
from .sides import Side, alarm_of, as_one
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
    trained on, if it is a reward; null takes what ``evaluate`` would: evaluate.training_reward, source.reward, or those that
    labelled the data by its build.json. sampler: how pictures are drawn. limits: of the alarm.

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
class Seen:
    """One check. alarm: against the base. wins: of the judge, None without one. figures: for the log."""

    alarm: Alarm
    wins: Paired | None
    figures: dict[str, float]


def see(base: Side, now: Side, spec: MonitorSpec, training: Sequence[tuple[Reward, float]] = (), *, seed: int = 0) -> Seen:
    """base, now: of the same prompts and seeds, whose ``rewards`` are those of ``training`` in its order, each with its weight
    (``as_one``). A judge that was trained on, or has a part in what was, is not held out: the alarm then has none."""
    tables = [(base.rewards[name], now.rewards[name]) for name in base.rewards]
    held_out = spec.judge is not None and not trained_on(spec.judge, [reward for reward, _ in training])
    found = alarm_of(base, now, training=as_one(tables, [weight for _, weight in training]), held_out=held_out,
                     limits=spec.limits)
    wins = None if spec.judge is None else paired(base.scores, now.scores, seed=seed, resamples=2000)
    figures = {"alarm": math.nan if found.fired is None else float(found.fired),
               "shift": max(abs(row.shift) for row in found.statistics)}
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


def with_defaults(spec: MonitorSpec, *, prompts: str | None, judge: Reward | None) -> MonitorSpec:
    """``spec`` with what other sections of the recipe say where it says nothing."""
    return replace(spec, prompts=spec.prompts or prompts, judge=spec.judge if spec.judge is not None else judge)
