"""One side of a comparison: a model's pictures of all prompts, as numbers. Runs of several training seeds are pooled.

A comparison is sides by name, each drawn on its own with the same prompts and picture seeds (``compare``). A study of many
runs keeps the base's side in a file and draws the others when they are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..methods.base import Context
from ..rewards.base import Reward, judged
from ..sampling.generate import generate, picture_seed
from ..sampling.music import checked_sounds
from ..sampling.sound import clips, makes_sounds, rate_of
from ..types import Batch, Memory, Sound
from ..world import Single, World
from .alarm import Alarm, Limits, alarm
from .files import write
from .medium import PICTURES, Medium
from .preference import Margins, measure
from .shards import blocks, exchange, packed, unpacked
from .spec import EvaluateSpec
from .statistics import Paired, paired, share_interval

Draw = Callable[[list[str], list[int]], list[Any]]  # prompts, seeds -> pictures, or clips
Place = tuple[int, int]  # a picture: row of its prompt, number of its seed


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model on P prompts with S pictures each.

    scores: [P, S] float32 of the judge, NaN where it cannot score (everywhere without a judge). rewards: the same for further
    rewards, by name. statistics: [n, P, S], in the order of the medium's ``looks``. spread: [P], mean distance between a
    prompt's pictures; NaN with one picture. margins: [pairs, draws] of ``pair_margins``, or None where they were not measured.
    """

    scores: np.ndarray
    statistics: np.ndarray
    spread: np.ndarray
    margins: np.ndarray | None = None
    rewards: dict[str, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``of`` takes back."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        if self.rewards:
            arrays |= {"reward_names": np.asarray(list(self.rewards)), "reward_scores": np.stack(list(self.rewards.values()))}
        return arrays

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Side:
        """arrays: of ``arrays``; others are left alone. Raises DataError where one is missing."""
        missing = [name for name in ("scores", "statistics", "spread") if name not in arrays]
        if missing:
            raise DataError(f"the arrays of a side lack {missing[0]}")
        names, scores = arrays.get("reward_names", ()), arrays.get("reward_scores", ())
        return cls(**{name: arrays[name] for name in ("scores", "statistics", "spread")}, margins=arrays.get("margins"),
                   rewards={str(name): row for name, row in zip(names, scores, strict=True)})

    def save(self, path: Path) -> None:
        write(path, packed(self.arrays()))

    @classmethod
    def load(cls, path: Path) -> Side:
        """Raises DataError naming the file where it is damaged."""
        try:
            return cls.of(unpacked(path.read_bytes()))
        except DataError as error:
            raise DataError(f"{path}: {error}; remove it and make it again") from None


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Runs of one method, which differ in their training seed, against the base.

    statistics: all runs' pictures of a prompt are one unit, so the interval is over prompts, for these runs. win_rates and
    scores: of each run alone. alarm: as in a comparison, of all runs together.
    """

    statistics: Paired
    win_rates: list[float]
    scores: list[float]
    alarm: Alarm


def draw_side(model, prompts: Sequence[str], judge: Reward | None, spec: EvaluateSpec, **options) -> Side:
    """model: a pipeline or a callable (prompts, seeds) -> pictures. options: those of ``draw_and_keep``."""
    return draw_and_keep(model, prompts, judge, spec, **options)[0]


def draw_and_keep(model, prompts: Sequence[str], judge: Reward | None, spec: EvaluateSpec, *,
                  rewards: Mapping[str, Reward] | None = None, keep: Collection[Place] = (), world: World | None = None,
                  drawn: Callable[[int], None] = lambda count: None,
                  medium: Medium = PICTURES) -> tuple[Side, dict[Place, Any]]:
    """A side, and the pictures at the places ``keep``. drawn: called with the number of pictures after each block. medium: of
    the model, whose pictures may be clips.

    Works in blocks of ``spec.batch_size`` pictures that the processes of ``world`` share, and forgets a block's pictures but
    those to keep, so memory does not grow with the number of prompts. All processes get the same result, which does not depend
    on their number. spec.seed must be given: it pairs the sides.
    """
    if spec.seed is None:
        raise ValueError("evaluate.seed is null: sides that are drawn apart need a seed in common")
    draw, seeds, world = as_draw(model, spec), picture_seeds(prompts, spec.seeds, spec.seed), world or Single()
    rewards = dict(rewards or {})

    def own() -> dict[str, np.ndarray]:
        """This process's blocks."""
        found = {}
        for rows in blocks(len(prompts), max(1, spec.batch_size // spec.seeds), world):
            texts = [prompt for prompt in prompts[rows] for _ in range(spec.seeds)]
            images = draw(list(texts), seeds[rows].ravel().tolist())
            if len(images) != len(texts):
                raise ValueError(f"{len(images)} {medium.noun} came back for {len(texts)} prompts")
            drawn(len(images))
            measured = _measured(images, texts, judge, rewards, spec.seeds, medium)
            found |= {f"{name} {rows.start}": values for name, values in measured.items()}
            found |= {f"picture {row} {number}": medium.pack(images[(row - rows.start) * spec.seeds + number])
                      for row, number in keep if rows.start <= row < rows.stop}
        return found

    found = exchange(world, own)
    table = {name: np.concatenate([found[key] for key in _in_order(found, name)])
             for name in ("scores", "rewards", "statistics", "spread")}
    side = Side(scores=table["scores"], statistics=np.moveaxis(table["statistics"], 0, 1), spread=table["spread"],
                rewards=dict(zip(rewards, np.moveaxis(table["rewards"], 0, 1), strict=True)))
    return side, {place: medium.unpack(found["picture {} {}".format(*place)]) for place in keep}


def _measured(images: list[Any], texts: list[str], judge: Reward | None, rewards: Mapping[str, Reward], count: int,
              medium: Medium) -> dict[str, np.ndarray]:
    """Of one block of prompts with ``count`` pictures each: arrays whose first axis is the prompt."""
    scores = np.full(len(images), np.nan, np.float32) if judge is None else judged(judge, images, texts).numpy()
    others = [scores if reward == judge else judged(reward, images, texts).numpy() for reward in rewards.values()]

    def by_prompt(rows: np.ndarray) -> np.ndarray:
        """[k, pictures] -> [prompts, k, S]."""
        return np.moveaxis(rows.reshape(len(rows), len(images) // count, count), 1, 0)

    return {"scores": scores.reshape(-1, count),
            "rewards": by_prompt(np.asarray(others, np.float32).reshape(len(others), len(images))),
            "statistics": by_prompt(medium.measure(images)),
            "spread": medium.spread(images, count)}


def _in_order(found: Mapping[str, np.ndarray], name: str) -> list[str]:
    return sorted((key for key in found if key.startswith(f"{name} ")), key=lambda key: int(key.rsplit(" ", 1)[1]))


def picture_seeds(prompts: Sequence[str], count: int, seed: int) -> np.ndarray:
    """``count`` seeds per prompt, [P, S] int64. A seed depends on the prompt's text, not on its place; where a prompt comes
    again it gets other seeds.
    """
    seen: dict[str, int] = {}
    table = []
    for prompt in prompts:
        first = seen.get(prompt, 0)
        seen[prompt] = first + count
        table.append([picture_seed(seed, prompt, first + s) for s in range(count)])
    return np.asarray(table, np.int64)


def as_draw(model, spec: EvaluateSpec) -> Draw:
    """A callable (prompts, seeds) -> pictures or clips from a pipeline, or the callable itself."""
    if makes_sounds(model):
        return lambda prompts, seeds: _sounds(model, spec, prompts, seeds)
    if hasattr(model, "components"):  # a diffusers pipeline; it is callable too, with another meaning
        return lambda prompts, seeds: generate(model, prompts, seeds, batch_size=spec.batch_size, progress=None,
                                               **sampling(spec))
    return model


def _sounds(pipe, spec: EvaluateSpec, prompts: list[str], seeds: list[int]) -> list[Sound]:
    try:
        waves = clips(pipe, prompts, seeds, seconds=spec.seconds, num_inference_steps=spec.num_inference_steps,
                      guidance_scale=spec.guidance_scale, progress=None)
    except ConfigError as error:
        raise ConfigError(f"evaluate.{error}") from None
    return checked_sounds(waves.numpy(), rate_of(pipe), prompts, seeds)


def sampling(spec: EvaluateSpec) -> dict[str, Any]:
    """What pipelines are called with."""
    names = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt")
    return {name: getattr(spec, name) for name in names}


def pool(base: Side, runs: Sequence[Side], *, seed: int = 0, resamples: int = 10_000) -> Pooled | None:
    """None when no picture was scored on both sides."""
    count = len(runs)
    result = paired(np.tile(base.scores, count), np.concatenate([run.scores for run in runs], 1), seed=seed,
                    resamples=resamples)
    if result is None:
        return None
    alone = [paired(base.scores, run.scores, seed=seed, resamples=10) for run in runs]
    # the mean of the runs, picture by picture: a base repeated once a run would seem to have been drawn that often
    together = Side(**{name: np.mean([getattr(run, name) for run in runs], 0) for name in ("scores", "statistics", "spread")})
    return Pooled(statistics=result, win_rates=[one.win_rate for one in alone if one],
                  scores=[one.aligned_score for one in alone if one], alarm=alarm_of(base, together, held_out=True))


def as_one(tables: Sequence[Sequence[np.ndarray]], weights: Sequence[float]) -> tuple[np.ndarray, ...] | None:
    """What several rewards say together, by side: the weighted mean of z-scores on the base. None where none has a weight.

    tables: of each reward, every side's scores [P, S], the base first. weights: of each; below 0 turns one round, 0 leaves it
    out, and they are divided by the sum of their sizes. A reward that is alone keeps its own unit.
    """
    used = [(table, weight) for table, weight in zip(tables, weights, strict=True) if weight]
    if len(used) == 1:
        return tuple(np.sign(used[0][1]) * scores for scores in used[0][0])
    total = sum(abs(weight) for _, weight in used)
    parts = [[weight / total * scores for scores in _standardised(table)] for table, weight in used]
    return tuple(sum(side) for side in zip(*parts)) or None


def _standardised(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[P, S] by side, the base first, in standard deviations of the base's."""
    base = scores[0].astype(np.float64)
    known = np.isfinite(base).any()
    mean, spread = (np.nanmean(base), np.nanstd(base)) if known else (0.0, 1.0)
    return [(values - mean) / (spread if spread > 0 else 1.0) for values in scores]


def alarm_of(base: Side, side: Side, *, training: tuple[np.ndarray, np.ndarray] | None = None,
             held_out: bool = False, limits: Limits | None = None, medium: Medium = PICTURES) -> Alarm:
    """What the alarm says of a side. training: both sides' scores [P, S] by what was optimised. held_out: whether ``scores``
    are of a judge that was not trained on. Statistics that were measured of neither side are left out.
    """
    known = np.isfinite(base.statistics).any((1, 2)) & np.isfinite(side.statistics).any((1, 2))
    spread = np.stack([base.spread, side.spread])
    return alarm(np.stack([base.statistics, side.statistics])[:, known], limits=limits, medium=medium,
                 names=[name for name, k in zip(medium.looks, known, strict=False) if k],  # older runs measured fewer
                 training=None if training is None else np.stack(training),
                 judge=np.stack([base.scores, side.scores]) if held_out and np.isfinite(base.scores).any() else None,
                 diversity=None if np.isnan(spread).all() else spread)


@torch.no_grad()
def pair_margins(denoiser, batches: Iterable[Batch], *, seed: int, draws: int = 8, device=None) -> np.ndarray:
    """Winner's minus loser's likelihood surrogate of held-out pairs under a denoiser as it stands, [pairs, draws] float32.

    Under the simple weighting, whatever a method was trained with, on draws that depend on ``seed`` alone: models measured
    one after another differ by their weights only.
    """
    ctx = Context(predict=lambda name, xt, t, cond: denoiser(xt, t, cond), process=denoiser.process, param=denoiser.param,
                  seed=seed, step=0, memory=Memory())
    parts = [measure(ctx, batch if device is None else batch.to(device), draws, None) for batch in batches]
    return Margins.merge(parts).policy.numpy()


def implicit_accuracy(base: np.ndarray, runs: Sequence[np.ndarray], *, seed: int = 0,
                      resamples: int = 10_000) -> tuple[float, float, float]:
    """Share of pairs whose winner gained more likelihood than the loser, with its 95 % interval over pairs (Wilson's where all
    pairs have the same share); margins [P, D].

    Runs of several training seeds are pooled pair by pair. Defined for every method, whether or not it reads a reference.
    """
    gains = np.stack([(run.astype(np.float64) - base).mean(1) for run in runs])
    right = ((gains > 0) + 0.5 * (gains == 0)).mean(0)
    return float(right.mean()), *share_interval(right, seed=seed, resamples=resamples)
