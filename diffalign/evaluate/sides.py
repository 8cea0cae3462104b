"""Several runs against one base: each side is drawn once, kept as numbers, and pooled over training runs.

``compare`` draws both models; a study of many runs would draw the same base again for each. A ``Side`` is what the comparison
needs of one model's pictures, without the pictures. Prompts and picture seeds pair as they do in ``compare``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..methods.base import Context
from ..rewards.base import Reward, judged
from ..types import Batch, Memory
from .compare import STATISTICS, Drift, as_draw, drift_of, picture_seeds, picture_statistics
from .files import write
from .preference import Margins, measure
from .spec import EvaluateSpec
from .statistics import Paired, bootstrap, paired


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model on P prompts with S pictures each.

    scores: [P, S] float32, NaN where the judge cannot score. statistics: [n, P, S], in the order of ``STATISTICS``.
    spread: [P], mean distance between a prompt's pictures (root mean square over pixels, 0 to 255); NaN with one picture.
    margins: [pairs, draws] of ``pair_margins``, or None where they were not measured.
    """

    scores: np.ndarray
    statistics: np.ndarray
    spread: np.ndarray
    margins: np.ndarray | None = None

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: value for name, value in vars(self).items() if value is not None})
        write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Side:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in stored.files})


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Runs of one method, which differ in their training seed, against the base.

    statistics: all runs' pictures of a prompt are one unit, so the interval is over prompts, for these runs. win_rates and
    scores: of each run alone. drift: as in a comparison. diversity: spread inside prompts over the base's, None with one
    picture each.
    """

    statistics: Paired
    win_rates: list[float]
    scores: list[float]
    drift: list[Drift]
    diversity: float | None


def draw_side(model, prompts: Sequence[str], judge: Reward, spec: EvaluateSpec) -> Side:
    """model: a pipeline or a callable (prompts, seeds) -> pictures. spec.seed must be given: it pairs the sides."""
    if spec.seed is None:
        raise ValueError("evaluate.seed is null: sides that are drawn apart need a seed in common")
    draw, seeds = as_draw(model, spec), picture_seeds(prompts, spec.seeds, spec.seed)
    scores, statistics = np.full(seeds.shape, np.nan, np.float32), np.full((len(STATISTICS), *seeds.shape), np.nan)
    spread, step = np.full(len(prompts), np.nan), max(1, spec.batch_size // spec.seeds)
    for start in range(0, len(prompts), step):
        rows = slice(start, start + step)
        texts = [prompt for prompt in prompts[rows] for _ in range(spec.seeds)]
        images = draw(texts, seeds[rows].ravel().tolist())
        shape = seeds[rows].shape
        scores[rows] = judged(judge, images, texts).numpy().reshape(shape)
        statistics[:, rows] = picture_statistics(images, texts).reshape(-1, *shape)
        if spec.seeds > 1:
            spread[rows] = [_spread(images[i:i + spec.seeds]) for i in range(0, len(images), spec.seeds)]
    return Side(scores=scores, statistics=statistics, spread=spread)


def _spread(images: list[Image.Image]) -> float:
    """Mean over pairs of the root mean square difference, 0 to 255."""
    arrays = [np.asarray(image.convert("RGB"), np.float64) for image in images]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(arrays) for b in arrays[i + 1:]]))


def pool(base: Side, runs: Sequence[Side], *, seed: int = 0, resamples: int = 10_000) -> Pooled | None:
    """None when no picture was scored on both sides."""
    count = len(runs)
    result = paired(np.tile(base.scores, count), np.concatenate([run.scores for run in runs], 1), seed=seed,
                    resamples=resamples)
    if result is None:
        return None
    alone = [paired(base.scores, run.scores, seed=seed, resamples=10) for run in runs]
    values = np.stack([np.tile(base.statistics, count), np.concatenate([run.statistics for run in runs], 2)])
    spread = np.mean([run.spread for run in runs], 0)
    return Pooled(
        statistics=result, win_rates=[one.win_rate for one in alone if one],
        scores=[one.aligned_score for one in alone if one],
        drift=drift_of(values, seed=seed, resamples=resamples),
        diversity=None if np.isnan(spread).all() else float(np.nanmean(spread) / np.nanmean(base.spread)))


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
    """Share of pairs whose winner gained more likelihood than the loser, with its 95 % interval over pairs; margins [P, D].

    Runs of several training seeds are pooled pair by pair. Defined for every method, whether or not it reads a reference.
    """
    gains = np.stack([(run.astype(np.float64) - base).mean(1) for run in runs])
    right = ((gains > 0) + 0.5 * (gains == 0)).mean(0)
    (low, high), = bootstrap(right[None], seed=seed, resamples=resamples)
    return float(right.mean()), low, high
