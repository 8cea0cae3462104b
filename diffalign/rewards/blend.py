"""Several rewards as one. Each combination is itself a reward: a function of one picture and its prompt, never of the batch.

A score of NaN from any part makes the combination NaN: what one reward could not read is not known to be good. Statistics
(mean, deviation, "good enough" level) are therefore fixed numbers, given as options or fitted once on sample pictures by the
functions below. What compares a prompt's pictures with each other builds data and is no reward: ``building/utility.py``.

Different rewards live on different scales (PickScore 18 to 23, HPSv2 0.2 to 0.35), so a plain sum is ruled by the widest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import Reward, asked, check, columns_of, identity, subject_of


@dataclass(frozen=True, kw_only=True)
class _Blend:
    """rewards: the parts, at least one. Options that are lists hold one number for each part; empty takes the default."""

    rewards: tuple[Reward, ...]

    def __post_init__(self):
        if not self.rewards:
            raise ValueError("rewards must hold at least one reward, got none")
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if field.name == "rewards" or not isinstance(values, (tuple, list)):
                continue
            if len(values) not in (0, len(self.rewards)):
                raise ValueError(f"{field.name} must hold one number for each of the {len(self.rewards)} rewards, "
                                 f"got {len(values)}")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{field.name} must be finite numbers, got {list(values)}")

    @property
    def differentiable(self) -> bool:
        """Gradients reach the pixels only through parts that all let them."""
        return all(reward.differentiable for reward in self.rewards)

    @property
    def subject(self) -> str:
        """What the parts score; ``check`` refuses parts of several subjects."""
        return subject_of(self.rewards[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """Every further column that some part reads, in the order of the parts."""
        return tuple(dict.fromkeys(name for reward in self.rewards for name in columns_of(reward)))

    def __call__(self, images: Any, prompts: Sequence[str], **columns) -> Tensor:
        """[N] float32. columns: lists of N, as ``columns`` names them; each part gets its own."""
        return self._combine(part_scores(self.rewards, images, prompts, **columns))

    def check(self) -> None:
        """What every part can say before any weight is loaded."""
        for reward in self.rewards:
            check(reward, self.subject)

    def identity(self) -> dict:
        """The parts with all that pins their numbers, and how they are combined."""
        return {"parts": [_facts(reward) for reward in self.rewards], **_options(self)}

    def _combine(self, scores: Tensor) -> Tensor:
        """scores [R, N] -> [N]."""
        raise NotImplementedError

    def _each(self, name: str, default: float, like: Tensor) -> Tensor:
        """The option's numbers as [R, 1], beside ``like``."""
        values = getattr(self, name) or (default,) * len(self.rewards)
        return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


@dataclass(frozen=True, kw_only=True)
class WeightedSum(_Blend):
    """sum_i weight_i * score_i, nothing normalised (flow_grpo's ``multi_score``, there called "avg"). weights: all 1."""

    weights: tuple[float, ...] = ()
    name = "weighted_sum"

    def _combine(self, scores: Tensor) -> Tensor:
        return (self._each("weights", 1.0, scores) * scores).sum(0)


@dataclass(frozen=True, kw_only=True)
class ZScore(_Blend):
    """sum_i weight_i * (score_i - mean_i) / std_i: the rewards on one scale, that of the pictures the statistics came from.

    means, stds: of each reward on sample pictures, as ``fit_z_score`` measures them; 0 and 1 when empty. weights: all 1.
    """

    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    name = "z_score"

    def __post_init__(self):
        super().__post_init__()
        if any(std <= 0 for std in self.stds):
            raise ValueError(f"stds must be above 0, got {list(self.stds)}")

    def _combine(self, scores: Tensor) -> Tensor:
        normalised = (scores - self._each("means", 0.0, scores)) / self._each("stds", 1.0, scores)
        return (self._each("weights", 1.0, scores) * normalised).sum(0)


@dataclass(frozen=True, kw_only=True)
class Minimum(_Blend):
    """The worst of weight_i * (score_i - shift_i): a picture is as good as its weakest side.

    shifts, weights: bring the rewards to one scale first, for example mean and 1 / standard deviation; 0 and 1 when empty.
    """

    shifts: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    name = "minimum"

    def __post_init__(self):
        super().__post_init__()
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"weights must be above 0, got {list(self.weights)}")

    def _combine(self, scores: Tensor) -> Tensor:
        return (self._each("weights", 1.0, scores) * (scores - self._each("shifts", 0.0, scores))).amin(0)


@dataclass(frozen=True, kw_only=True)
class LogSigmoidCentred(_Blend):
    """sum_i weight_i * log sigmoid(scale_i * (score_i - reference_i)) <= 0 (Wang et al., arXiv 2402.00742).

    With Bradley-Terry rewards each term is the log probability that the picture beats a "good enough" one, so the sum is the
    log probability of "good in all respects", were they independent. What is good enough earns little more; what is bad pays
    in full. references: each reward's "good enough" level, see ``fit_references``; the paper has one a prompt, here it is one
    number a reward. scales: bring a reward to logits; PickScore and Bradley-Terry heads are, raw cosines (CLIP, HPS) are not.
    """

    references: tuple[float, ...]
    scales: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    name = "log_sigmoid_centred"

    def __post_init__(self):
        super().__post_init__()
        if not self.references:
            raise ValueError("references must hold one level for each reward, got none; fit_references measures them")
        for option in ("scales", "weights"):
            if any(value <= 0 for value in getattr(self, option)):
                raise ValueError(f"{option} must be above 0, got {list(getattr(self, option))}")

    def _combine(self, scores: Tensor) -> Tensor:
        logits = self._each("scales", 1.0, scores) * (scores - self._each("references", 0.0, scores))
        return (self._each("weights", 1.0, scores) * F.logsigmoid(logits)).sum(0)


@dataclass(frozen=True, kw_only=True)
class Calibrated(_Blend):
    """sum_i weight_i * score_i with weights fitted to preference data, so that a difference of two scores is the log odds of
    the preference (Bradley-Terry; the idea of MetaMetrics, arXiv 2410.02381, with logistic regression in place of its search).

    path: the JSON file that ``diffalign.reward_training.fit_calibration`` wrote; it names the rewards its weights belong to.
    """

    path: str
    name = "calibrated"

    @cached_property
    def calibration(self) -> dict:
        """The file's contents. Raises ConfigError when it is missing, damaged, or made for other rewards."""
        return _read_calibration(Path(self.path), [reward.name for reward in self.rewards])

    def check(self) -> None:
        super().check()
        _ = self.calibration

    def identity(self) -> dict:
        return {**super().identity(), "weights": self.calibration["weights"]}

    def _combine(self, scores: Tensor) -> Tensor:
        weights = torch.tensor(self.calibration["weights"], dtype=torch.float32, device=scores.device)
        return (weights[:, None] * scores).sum(0)


def part_scores(rewards: Sequence[Reward], images: Any, prompts: Sequence[str], **columns) -> Tensor:
    """Every reward on every picture, [R, N] float32. Raises RewardError naming the one that fails or gives anything else."""
    images = list(images)
    rows = [asked(reward, images, prompts, {name: columns[name] for name in columns_of(reward) if name in columns})
            for reward in rewards]
    return torch.stack([row.to(rows[0].device) for row in rows])


# Statistics, measured once on sample pictures.


def fit_z_score(rewards: Sequence[Reward], images: Any, prompts: Sequence[str], *, weights: Sequence[float] = (),
                **columns) -> ZScore:
    """A ``ZScore`` whose means and stds (ddof 0) are those of these pictures; what a reward could not score is left out.

    Raises ConfigError for a reward that gives all of them the same score, or scores none.
    """
    means, stds = [], []
    for reward, scores in zip(rewards, _known(rewards, images, prompts, columns), strict=True):
        if scores.min() == scores.max():
            raise ConfigError(f'reward "{reward.name}" gives all {len(scores)} pictures the same score, which has no '
                              "deviation to divide by; fit on more pictures, or leave the reward out")
        means.append(float(scores.mean()))
        stds.append(float(scores.std(correction=0)))
    return ZScore(rewards=tuple(rewards), means=tuple(means), stds=tuple(stds), weights=tuple(weights))


def fit_references(rewards: Sequence[Reward], images: Any, prompts: Sequence[str], *, quantile: float = 0.85,
                   **columns) -> tuple[float, ...]:
    """Each reward's ``quantile`` (linear interpolation) on the base model's pictures: the level that LSC calls good enough."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in 0..1, got {quantile}")
    return tuple(float(scores.quantile(quantile)) for scores in _known(rewards, images, prompts, columns))


def _known(rewards: Sequence[Reward], images: Any, prompts: Sequence[str], columns: dict) -> list[Tensor]:
    """For each reward its scores that are no NaN, float64 [up to N]."""
    scores = [row[~row.isnan()].double() for row in part_scores(rewards, images, prompts, **columns).detach()]
    for reward, known in zip(rewards, scores, strict=True):
        if not len(known):
            raise ConfigError(f'reward "{reward.name}" could score none of the {len(list(prompts))} pictures')
    return scores


# What pins the numbers.


def _facts(reward: Reward) -> dict:
    return {**_options(reward), **identity(reward)}


def _options(reward: Any) -> dict:
    """The plain options of a component, JSON-ready; its parts are no options."""
    if not dataclasses.is_dataclass(reward):
        return {}
    values = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward) if field.name != "rewards"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _read_calibration(path: Path, names: list[str]) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"path: {path} does not exist; fit a calibration first") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"path: {path} is no readable calibration ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("rewards"), list) or not isinstance(found.get("weights"), list):
        raise ConfigError(f"path: {path} is no calibration; it needs the lists rewards and weights")
    if found["rewards"] != names:
        raise ConfigError(f"path: {path} was fitted for {found['rewards']}, in this order, but the rewards are {names}")
    weights = found["weights"]
    if len(weights) != len(names) or not all(_is_number(weight) for weight in weights):
        raise ConfigError(f"path: {path} must hold one finite weight for each reward, got {str(weights)[:80]}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
