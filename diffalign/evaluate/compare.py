"""The comparison of base and aligned: same prompts, same seeds, judged by a reward, with an honest interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .. import rng
from ..errors import ConfigError, DataError
from ..rewards.base import Reward, judged
from ..rewards.rules import Brightness, Colourfulness, Compressibility
from ..sampling.generate import generate, picture_seed
from .spec import EvaluateSpec
from .statistics import Paired, bootstrap, paired

Draw = Callable[[list[str], list[int]], list[Image.Image]]
STATISTICS = (Brightness(), Colourfulness(), Compressibility())
DRIFT = 0.5  # a picture statistic that moves by more than this many standard deviations of the base is flagged


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One prompt's two pictures of the same seed. index: row in the prompt list. Scores are None when not judged."""

    index: int
    prompt: str
    seed: int
    base: Image.Image
    aligned: Image.Image
    base_score: float | None
    aligned_score: float | None

    @property
    def gain(self) -> float:
        """aligned minus base; NaN where a side was not scored."""
        if self.base_score is None or self.aligned_score is None:
            return float("nan")
        return self.aligned_score - self.base_score


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How a cheap statistic of the pictures moved: the first sign of a judge being gamed (colour casts, smoothing).

    shift: difference of the means in standard deviations of the base; flagged beyond 0.5 when the 95 % interval of the
    difference also leaves 0 out.
    """

    name: str
    base: float
    aligned: float
    shift: float
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """base_scores, aligned_scores: [P, S] float32 or None without a judge. seeds: [P, S] int64, per picture.

    statistics: over all prompts, None without a judge. categories: the same per category. tiles: rows for the grid, drawn
    at random; best and worst: the largest gains and losses. sampling: what the pictures were drawn with.
    """

    prompts: list[str]
    seeds: np.ndarray
    judge: str | None
    base_scores: np.ndarray | None
    aligned_scores: np.ndarray | None
    statistics: Paired | None
    tiles: list[Tile]
    best: list[Tile]
    worst: list[Tile]
    drift: list[Drift]
    sampling: dict[str, Any]
    categories: dict[str, Paired] = field(default_factory=dict)


def compare(base, aligned, prompts: Sequence[str], judge: Reward | None, spec: EvaluateSpec, *,
            run_seed: int = 0, categories: Sequence[str] | None = None, extremes: int = 6,
            progress: str | None = "comparing") -> Comparison:
    """base, aligned: diffusers pipelines, or callables (prompts, seeds) -> pictures (see ``lora_off_and_on``).

    run_seed: used where ``spec.seed`` is None. extremes: how many of the largest gains and losses are kept.

    Works through the prompts in blocks and keeps only the pictures it will show, so memory does not grow with the number of
    prompts. Raises ConfigError where the judge can score no picture at all, DataError for an empty list of prompts.
    """
    prompts = list(prompts)
    if not prompts:
        raise DataError("evaluate.prompts: no prompt to compare on")
    spec = spec if spec.seed is not None else replace(spec, seed=run_seed)
    sides = [as_draw(side, spec) for side in (base, aligned)]
    seeds = picture_seeds(prompts, spec.seeds, spec.seed)
    kept = _Kept(rows=_random_rows(len(prompts), spec), extremes=extremes)
    scores, statistics = np.full((2, *seeds.shape), np.nan, np.float32), np.full((2, len(STATISTICS), *seeds.shape), np.nan)
    step = max(1, spec.batch_size // spec.seeds)
    with tqdm(total=2 * seeds.size, desc=progress, unit="picture", disable=True if progress is None else None) as bar:
        for start in range(0, len(prompts), step):
            rows = slice(start, start + step)
            texts = [prompt for prompt in prompts[rows] for _ in range(spec.seeds)]
            numbers = seeds[rows].ravel().tolist()
            pictures = [_drawn(draw, texts, numbers, bar) for draw in sides]
            shape = seeds[rows].shape
            for s, images in enumerate(pictures):
                statistics[s, :, rows] = picture_statistics(images, texts).reshape(-1, *shape)
                if judge is not None:
                    scores[s, rows] = judged(judge, images, texts).numpy().reshape(shape)
            kept.offer(start, texts, numbers, pictures, scores[:, rows].reshape(2, -1), spec.seeds)
    result = _judged(scores, judge, spec)
    best, worst = kept.extremes_of() if judge is not None else ([], [])
    return Comparison(
        prompts=prompts, seeds=seeds, judge=judge.name if judge is not None else None,
        base_scores=None if judge is None else scores[0], aligned_scores=None if judge is None else scores[1],
        statistics=result, tiles=kept.tiles(judge is not None), best=best, worst=worst,
        drift=drift_of(statistics, seed=spec.seed, resamples=spec.bootstrap_resamples), sampling=said(spec),
        categories=_by_category(scores, categories, judge, spec))


def lora_off_and_on(pipe, spec: EvaluateSpec) -> tuple[Draw, Draw]:
    """The two sides of a comparison from one pipeline with a loaded LoRA: adapters off (the base), adapters on.

    Needs the memory of one model. The adapters are on again after every block, also when drawing fails.
    """
    return as_draw(_Off(pipe), spec), as_draw(pipe, spec)


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


@dataclass(frozen=True)
class _Off:
    """A pipeline whose adapters are off while it draws."""

    pipe: Any

    @contextmanager
    def __call__(self):
        self.pipe.disable_lora()
        try:
            yield self.pipe
        finally:
            self.pipe.enable_lora()


def as_draw(side, spec: EvaluateSpec) -> Draw:
    """A callable (prompts, seeds) -> pictures from a pipeline, or the callable itself."""
    if isinstance(side, _Off):
        def draw(prompts, seeds):
            with side() as pipe:
                return _generate(pipe, prompts, seeds, spec)
        return draw
    if hasattr(side, "components"):  # a diffusers pipeline; it is callable too, with another meaning
        return lambda prompts, seeds: _generate(side, prompts, seeds, spec)
    return side


def _generate(pipe, prompts, seeds, spec: EvaluateSpec) -> list[Image.Image]:
    return generate(pipe, prompts, seeds, batch_size=spec.batch_size, progress=None, **_sampling(spec))


def _sampling(spec: EvaluateSpec) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt")
    return {name: getattr(spec, name) for name in names}


def said(spec: EvaluateSpec) -> dict[str, Any]:
    """How the pictures are drawn, for a report: what the pipelines are called with, and the scheduler put into them."""
    return {**_sampling(spec), "scheduler": spec.scheduler, "timestep_spacing": spec.timestep_spacing}


def _drawn(draw: Draw, texts: list[str], seeds: list[int], bar) -> list[Image.Image]:
    images = draw(list(texts), list(seeds))
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures came back for {len(texts)} prompts")
    bar.update(len(images))
    return images


def picture_statistics(images: list[Image.Image], texts: list[str]) -> np.ndarray:
    """[statistics, pictures], in the order of ``STATISTICS``."""
    return np.stack([statistic(images, texts).numpy() for statistic in STATISTICS])


def _judged(scores: np.ndarray, judge: Reward | None, spec: EvaluateSpec) -> Paired | None:
    if judge is None:
        return None
    result = paired(*scores, seed=spec.seed, resamples=spec.bootstrap_resamples)
    if result is None:
        raise ConfigError(f'evaluate.judge: reward "{judge.name}" could score none of {scores[0].size} pairs of pictures; '
                          "choose a judge that understands these prompts")
    return result


def _by_category(scores, categories, judge, spec: EvaluateSpec) -> dict[str, Paired]:
    if judge is None or categories is None:
        return {}
    names = np.asarray(categories)
    if len(names) != scores.shape[1]:
        raise ValueError(f"{len(names)} categories for {scores.shape[1]} prompts")
    found = {str(name): paired(*scores[:, names == name], seed=spec.seed, resamples=spec.bootstrap_resamples)
             for name in dict.fromkeys(categories)}
    return {name: result for name, result in found.items() if result is not None}


def drift_of(values: np.ndarray, *, seed: int, resamples: int) -> list[Drift]:
    """values: [2, statistics, P, S], base first, of ``picture_statistics``."""
    rows = np.nanmean(values, axis=3)  # [2, statistics, P]
    intervals = bootstrap(rows[1] - rows[0], seed=seed, resamples=min(2000, resamples))
    return [_one_drift(statistic.name, *rows[:, i], *intervals[i]) for i, statistic in enumerate(STATISTICS)]


def _one_drift(name: str, base: np.ndarray, aligned: np.ndarray, low: float, high: float) -> Drift:
    spread = float(base.std())
    moved = float(aligned.mean() - base.mean())
    shift = moved / spread if spread > 0 else 0.0
    return Drift(name=name, base=float(base.mean()), aligned=float(aligned.mean()), shift=shift,
                 flagged=abs(shift) > DRIFT and not low <= 0 <= high)


def _random_rows(count: int, spec: EvaluateSpec) -> list[int]:
    return sorted(rng.permutation(count, spec.seed, "grid")[: spec.grid_prompts].tolist())


class _Kept:
    """The pictures worth showing: some rows drawn at random beforehand, and the largest gains and losses so far."""

    def __init__(self, rows: list[int], extremes: int):
        self.rows, self.count = set(rows), extremes
        self.random: list[Tile] = []
        self.gains: list[Tile] = []

    def offer(self, start: int, texts, seeds, pictures, scores: np.ndarray, per_prompt: int) -> None:
        """One block: texts and seeds of its pictures, pictures [2][n], scores [2, n]; start: its first prompt's row."""
        for n, text in enumerate(texts):
            index = start + n // per_prompt
            tile = Tile(index=index, prompt=text, seed=int(seeds[n]), base=pictures[0][n], aligned=pictures[1][n],
                        base_score=_number(scores[0, n]), aligned_score=_number(scores[1, n]))
            if index in self.rows and n % per_prompt == 0:
                self.random.append(tile)
            if abs(tile.gain) > 0:  # False for NaN
                self.gains.append(tile)
        ranked = sorted(self.gains, key=lambda tile: tile.gain)
        self.gains = ranked if len(ranked) <= 2 * self.count else ranked[: self.count] + ranked[-self.count :]

    def tiles(self, judged: bool) -> list[Tile]:
        return self.random if judged else [replace(tile, base_score=None, aligned_score=None) for tile in self.random]

    def extremes_of(self) -> tuple[list[Tile], list[Tile]]:
        """(largest gains, largest losses), the largest first."""
        best = [tile for tile in reversed(self.gains) if tile.gain > 0][: self.count]
        return best, [tile for tile in self.gains if tile.gain < 0][: self.count]


def _number(score: float) -> float | None:
    return None if np.isnan(score) else float(score)


def statistics_dict(result: Paired) -> dict[str, Any]:
    """For report.json."""
    return {**asdict(result), "sentence": result.sentence}
