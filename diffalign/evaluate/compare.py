"""The comparison: any number of models beside a base, same prompts, same seeds, judged by a reward, with honest intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .. import rng
from ..errors import ConfigError, DataError
from ..rewards.base import Reward, identity, unlike
from ..types import Sound
from ..world import Single, World
from .alarm import Alarm
from .medium import PICTURES, Medium
from .sides import Draw, Place, Side, alarm_of, as_draw, as_one, draw_and_keep, picture_seeds, sampling
from .spec import ALIGNED, EvaluateSpec
from .statistics import ERROR, Paired, Sweep, holm, outcomes, paired, sweep

__all__ = ["Comparison", "Stage", "Tile", "compare", "lora_off_and_on", "picture_seeds", "said", "statistics_dict",
           "trained_on"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Models that are in memory together. open: a context in which each of ``names`` has a pipeline, or a callable (prompts,
    seeds) -> pictures. facts: by name, what the model is, JSON-ready.
    """

    names: tuple[str, ...]
    open: Callable[[], AbstractContextManager[Mapping[str, Any]]]
    facts: Mapping[str, dict] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One prompt's pictures of the same seed, by model. index: row in the prompt list. scores: the judge's, None where it gave
    none. clips: of models of sounds, whose pictures are spectrograms.
    """

    index: int
    prompt: str
    seed: int
    pictures: dict[str, Image.Image]
    scores: dict[str, float | None]
    clips: dict[str, Sound] = field(default_factory=dict)

    def winner(self, names: Sequence[str]) -> str | None:
        """Of these, the one with the highest score; None for a tie, or where fewer than two are scored."""
        ranked = sorted(((self.scores[name], name) for name in names if self.scores[name] is not None), reverse=True)
        return ranked[0][1] if len(ranked) > 1 and not outcomes(ranked[0][0], ranked[1][0]) == 0.5 else None

    def gain(self, name: str, base: str) -> float:
        """Score of the model minus the base's; NaN where a side was not scored."""
        one, other = self.scores[base], self.scores[name]
        return float("nan") if one is None or other is None else other - one


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """sides: by name, the base first. models: those that are compared with the base, the one that the verdict is about first.
    strengths: sides of a sweep, strength by name (they may be models as well); swept: theirs beside the base, by the judge.
    seeds: [P, S] int64, per picture.

    results: of the judge, by model; empty without one. corrected: Holm's p-values of the sign tests. rewards: reward -> model
    -> statistics, without the judge. categories: model -> category -> statistics. alarms: by model. tiles: rows for the grid,
    drawn at random; best and worst: the largest gains and losses of the first model, with its and the base's pictures.
    sampling: what the pictures were drawn with. training: names of the rewards that were optimised, None where not known.
    trained: those of ``rewards`` that are among them, or a part of one. held_out: whether the judge is none of them; None
    where not known. identity: of models and rewards. subject: what the models make, "pictures" or "clips".
    """

    prompts: list[str]
    seeds: np.ndarray
    judge: str | None
    sides: dict[str, Side]
    models: tuple[str, ...]
    results: dict[str, Paired]
    tiles: list[Tile]
    best: list[Tile]
    worst: list[Tile]
    alarms: dict[str, Alarm]
    sampling: dict[str, Any]
    rewards: dict[str, dict[str, Paired]] = field(default_factory=dict)
    categories: dict[str, dict[str, Paired]] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    sweep: Sweep | None = None
    swept: dict[str, Paired] = field(default_factory=dict)
    training: tuple[str, ...] | None = None
    trained: tuple[str, ...] = ()
    held_out: bool | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    subject: str = "pictures"

    @property
    def base(self) -> str:
        return next(iter(self.sides))

    @property
    def main(self) -> str:
        """The model that the verdict is about."""
        return self.models[0]

    @property
    def statistics(self) -> Paired | None:
        """Of the main model, by the judge."""
        return self.results.get(self.main)

    @property
    def corrected(self) -> dict[str, float]:
        """Holm's p-values over all models that are compared with the base."""
        return dict(zip(self.results, holm([result.sign_test for result in self.results.values()]), strict=True))

    def verdict(self, name: str) -> str | None:
        """By the judge's interval; where several models are compared, only if the corrected sign test agrees."""
        result = self.results.get(name)
        if result is None:
            return None
        return result.verdict if len(self.results) == 1 or self.corrected[name] < ERROR else "undecided"

    @property
    def headline(self) -> str | None:
        """The verdict in plain English."""
        result = self.statistics
        if result is None:
            return None
        return result.about(_called(self.main)) if self.verdict(self.main) == result.verdict else self._lost(result)

    @property
    def remarks(self) -> list[str]:
        """What limits the verdict: the number of models compared, a judge that was trained on."""
        found = [self._others()] if len(self.results) > 1 else []
        if self.results and self.held_out is False:
            found.append(f"The judge ({self.judge}) was trained on: not held out. A win shows that training worked, not that "
                         f"the {self.subject} are better.")
        return found

    @property
    def sentence(self) -> str | None:
        """Headline and remarks."""
        return None if self.headline is None else " ".join([self.headline, *self.remarks])

    def _lost(self, result: Paired) -> str:
        return (f"No difference is shown once {len(self.results)} models are compared: taken alone the {_called(self.main)} "
                f"would count as {result.verdict} ({100 * result.win_rate:.1f}% of {result.prompts:,} prompts, 95% interval "
                f"{100 * result.win_rate_low:.1f}% to {100 * result.win_rate_high:.1f}%), but its p-value is "
                f"{self.corrected[self.main]:.2g} after Holm's correction.")

    def _others(self) -> str:
        groups = {verdict: [name for name in self.results if self.verdict(name) == verdict]
                  for verdict in ("better", "worse", "undecided")}
        words = {"undecided": "not decided"}
        found = "; ".join(f"{words.get(verdict, verdict)}: {', '.join(names)}" for verdict, names in groups.items() if names)
        return (f"{len(self.results)} models were compared with the {self.base}, so their sign tests are corrected by Holm's "
                f"rule: {found}.")


def compare(models, prompts: Sequence[str], spec: EvaluateSpec, *, run_seed: int = 0, categories: Sequence[str] | None = None,
            compared: Sequence[str] | None = None, strengths: Mapping[str, float] | None = None,
            training: Sequence[Reward] | None = None, weights: Sequence[float] | None = None,
            facts: Mapping[str, Any] | None = None, show_seeds: int = 1, extremes: int = 6,
            progress: str | None = "comparing", world: World | None = None, medium: Medium = PICTURES,
            drawn_with: Mapping[str, Any] | None = None) -> Comparison:
    """models: ``Stage``s, or a mapping of names to diffusers pipelines or callables (prompts, seeds) -> pictures; the first
    name is the base.

    compared: the models that are compared with it, the main one first; None takes the second name, and all others that are in
    no sweep. strengths: sides of a strength sweep. training: rewards that were optimised, None where not known; weights: of
    each, as ``as_one`` takes them, 1 if None. facts: added to ``identity``. run_seed: used where ``spec.seed`` is None.
    show_seeds: seeds per prompt among the tiles. extremes: how many of the largest gains and losses are shown; their pictures
    are drawn once more. medium: what the models make, if no pictures; drawn_with: how, where it is not as pipelines do.

    Each model is drawn on its own and leaves numbers and the pictures that will be shown, so memory grows neither with the
    number of prompts nor of models. Raises ConfigError where the judge can score no picture of the main model, DataError for
    an empty list of prompts.
    """
    prompts, world = list(prompts), world or Single()
    if not prompts:
        raise DataError("evaluate.prompts: no prompt to compare on")
    spec = spec if spec.seed is not None else replace(spec, seed=run_seed)
    stages = [Stage(names=tuple(models), open=lambda: nullcontext(models))] if isinstance(models, Mapping) else list(models)
    names = [name for stage in stages for name in stage.names]
    strengths = dict(strengths or {})
    if compared is None:
        compared = [*names[1:2], *(name for name in names[2:] if name not in strengths)]
    compared = tuple(compared)
    rewards = _rewards(spec, training)
    places = [(row, number) for row in _random_rows(len(prompts), spec) for number in range(min(show_seeds, spec.seeds))]
    sides, kept = _drawn(stages, prompts, spec, rewards, places, world, progress, medium)
    order = [names[0], *compared, *(name for name in names if name not in (names[0], *compared))]
    sides, kept = ({name: table[name] for name in order} for table in (sides, kept))
    seeds = picture_seeds(prompts, spec.seeds, spec.seed)
    results = _results(sides, compared, spec, medium) if spec.judge is not None else {}
    tiles = [_tile(place, prompts, seeds, sides, {name: pictures[place] for name, pictures in kept.items()}, spec.judge,
                   medium) for place in places]
    best, worst = _extremes(stages, sides, compared[0], prompts, seeds, spec, extremes if results else 0, world, medium)
    return Comparison(
        prompts=prompts, seeds=seeds, judge=spec.judge.name if spec.judge is not None else None, sides=sides, models=compared,
        results=results, tiles=tiles, best=best, worst=worst, strengths=strengths, subject=medium.noun,
        sampling=said(spec) if drawn_with is None else dict(drawn_with),
        alarms=_alarms(sides, compared, spec, rewards, training, weights, medium),
        rewards={reward: _against_base({name: side.rewards[reward] for name, side in sides.items()}, compared, spec)
                 for reward in rewards},
        categories=_by_category(sides, compared, categories, spec) if results else {},
        sweep=sweep({name: sides[name].scores for name in strengths}, seed=spec.seed, resamples=spec.bootstrap_resamples)
        if strengths and spec.judge is not None else None,
        swept=_against_base({name: side.scores for name, side in sides.items()}, [n for n in strengths if n != names[0]], spec)
        if spec.judge is not None else {},
        training=None if training is None else tuple(reward.name for reward in training),
        trained=tuple(name for name, reward in rewards.items() if trained_on(reward, training or ())),
        held_out=None if training is None or spec.judge is None else not trained_on(spec.judge, training),
        identity={"models": {name: {} for name in names} | {n: dict(f) for stage in stages for n, f in stage.facts.items()},
                  "judge": None if spec.judge is None else identity(spec.judge),
                  "rewards": {name: identity(reward) for name, reward in rewards.items()}, **(facts or {})})


def _alarms(sides: Mapping[str, Side], compared: Sequence[str], spec: EvaluateSpec, rewards: Mapping[str, Reward],
            training: Sequence[Reward] | None, weights: Sequence[float] | None, medium: Medium) -> dict[str, Alarm]:
    """Of every model beside the base."""
    def scores(reward: Reward) -> list[np.ndarray]:
        if reward == spec.judge:
            return [side.scores for side in sides.values()]
        name = next(name for name, known in rewards.items() if known == reward)
        return [side.rewards[name] for side in sides.values()]

    training = training or ()
    optimised = as_one([scores(reward) for reward in training], [1.0] * len(training) if weights is None else weights)
    by, base = dict(zip(sides, optimised or ())), next(iter(sides))
    held_out = spec.judge is not None and not trained_on(spec.judge, training)
    return {name: alarm_of(sides[base], sides[name], training=(by[base], by[name]) if by else None, held_out=held_out,
                           medium=medium)
            for name in compared}


def lora_off_and_on(pipe, spec: EvaluateSpec) -> tuple[Draw, Draw]:
    """The two sides of a comparison from one pipeline with a loaded LoRA: adapters off (the base), adapters on.

    Needs the memory of one model. The adapters are on again after every block, also when drawing fails.
    """
    draw = as_draw(pipe, spec)

    def off(prompts, seeds):
        with adapters_off(pipe):
            return draw(prompts, seeds)

    return off, draw


@contextmanager
def adapters_off(pipe) -> Iterator[None]:
    pipe.disable_lora()
    try:
        yield
    finally:
        pipe.enable_lora()


def trained_on(judge: Reward, training: Sequence[Reward]) -> bool:
    """Whether the judge, or a part of it, is among the rewards that were optimised or their parts (of a weighted sum, say).

    The same class with the same identity is the same reward, whatever its batch size.
    """
    def same(one: Reward, other: Reward) -> bool:
        return one == other or type(one) is type(other) and identity(one) == identity(other)

    return any(same(one, other) for one in _parts(judge) for reward in training for other in _parts(reward))


def _parts(value: Any) -> list[Any]:
    """A reward and those among its options; of a list or mapping, those inside."""
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _parts(item)]
    if isinstance(value, dict):
        return _parts(tuple(value.values()))
    if not dataclasses.is_dataclass(value) or not hasattr(value, "differentiable"):
        return []
    inside = _parts(tuple(getattr(value, f.name) for f in dataclasses.fields(value)))
    return inside or [value]  # a combination is its parts


def said(spec: EvaluateSpec) -> dict[str, Any]:
    """How the pictures are drawn, for a report: what the pipelines are called with, and the scheduler put into them."""
    return {**sampling(spec), "scheduler": spec.scheduler, "timestep_spacing": spec.timestep_spacing, "seeds": spec.seeds,
            "seed": spec.seed, "batch_size": spec.batch_size, **({"seconds": spec.seconds} if spec.seconds else {})}


def _called(name: str) -> str:
    return "aligned model" if name == ALIGNED else f'model "{name}"'


def _rewards(spec: EvaluateSpec, training: Sequence[Reward] | None) -> dict[str, Reward]:
    """The recipe's rewards, and those that were optimised if they are not among them; the judge is apart."""
    found = dict(spec.rewards)
    for reward in training or ():
        if reward not in found.values() and reward != spec.judge:
            name = reward.name if reward.name not in found else unlike(f"{reward.name} (trained on)", found)
            found[name] = reward
    return found


def _drawn(stages: Sequence[Stage], prompts: list[str], spec: EvaluateSpec, rewards: Mapping[str, Reward],
           places: list[Place], world: World, progress: str | None, medium: Medium):
    """Sides and kept pictures by name, in the stages' order."""
    sides, kept = {}, {}
    total = len(prompts) * spec.seeds * sum(len(stage.names) for stage in stages)
    hidden = True if progress is None or world.rank else None  # None: hidden where the output is no terminal
    with tqdm(total=total, desc=progress, unit=medium.noun.removesuffix("s"), disable=hidden) as bar:
        for stage in stages:
            with stage.open() as open_models:
                for name in stage.names:
                    sides[name], kept[name] = draw_and_keep(
                        open_models[name], prompts, spec.judge, spec, rewards=rewards, keep=places, world=world,
                        drawn=lambda count: bar.update(min(count * world.size, bar.total - bar.n)), medium=medium)
    return sides, kept


def _results(sides: Mapping[str, Side], compared: Sequence[str], spec: EvaluateSpec, medium: Medium) -> dict[str, Paired]:
    found = _against_base({name: side.scores for name, side in sides.items()}, compared, spec)
    if compared[0] not in found:
        raise ConfigError(f'evaluate.judge: reward "{spec.judge.name}" could score none of {sides[compared[0]].scores.size} '
                          f"pairs of {medium.noun}; choose a judge that understands these prompts")
    return found


def _against_base(scores: Mapping[str, np.ndarray], compared: Sequence[str], spec: EvaluateSpec) -> dict[str, Paired]:
    """scores: [P, S] by name, the base first. Models without a scored pair are left out."""
    base = next(iter(scores.values()))
    found = {name: paired(base, scores[name], seed=spec.seed, resamples=spec.bootstrap_resamples) for name in compared}
    return {name: result for name, result in found.items() if result is not None}


def _by_category(sides: Mapping[str, Side], compared: Sequence[str], categories: Sequence[str] | None,
                 spec: EvaluateSpec) -> dict[str, dict[str, Paired]]:
    if categories is None:
        return {}
    kinds = np.asarray(categories)
    if len(kinds) != len(next(iter(sides.values())).scores):
        raise ValueError(f"{len(kinds)} categories for {len(next(iter(sides.values())).scores)} prompts")
    found: dict[str, dict[str, Paired]] = {name: {} for name in compared}
    for kind in dict.fromkeys(categories):
        results = _against_base({name: side.scores[kinds == kind] for name, side in sides.items()}, compared, spec)
        for name, result in results.items():
            found[name][str(kind)] = result
    return found


def _random_rows(count: int, spec: EvaluateSpec) -> list[int]:
    return sorted(rng.permutation(count, spec.seed, "grid")[: spec.grid_prompts].tolist())


def _tile(place: Place, prompts: list[str], seeds: np.ndarray, sides: Mapping[str, Side], samples: dict[str, Any],
          judge: Reward | None, medium: Medium) -> Tile:
    return Tile(index=place[0], prompt=prompts[place[0]], seed=int(seeds[place]), clips=samples if medium.audible else {},
                pictures={name: medium.picture(sample) for name, sample in samples.items()},
                scores={name: None if judge is None else _number(sides[name].scores[place]) for name in samples})


def _extremes(stages: Sequence[Stage], sides: Mapping[str, Side], main: str, prompts: list[str], seeds: np.ndarray,
              spec: EvaluateSpec, count: int, world: World, medium: Medium) -> tuple[list[Tile], list[Tile]]:
    """(largest gains, largest losses), the largest first; the first process draws their pictures again."""
    base = next(iter(sides))
    gains = sides[main].scores.astype(np.float64) - sides[base].scores
    places = [tuple(int(n) for n in np.unravel_index(i, gains.shape)) for i in np.argsort(gains, axis=None, kind="stable")
              if abs(gains.flat[i]) > 0]  # False for NaN
    worst = [place for place in places if gains[place] < 0][:count]
    best = [place for place in reversed(places) if gains[place] > 0][:count]
    wanted = [*best, *worst]
    if not wanted or world.rank:
        return [], []
    pictures: dict[str, dict[Place, Any]] = {}
    for stage in stages:
        shown = [name for name in stage.names if name in (base, main)]
        if shown:
            with stage.open() as open_models:
                for name in shown:
                    draw = as_draw(open_models[name], spec)
                    drawn = draw([prompts[row] for row, _ in wanted], [int(seeds[place]) for place in wanted])
                    pictures[name] = dict(zip(wanted, drawn, strict=True))
    tiles = {place: _tile(place, prompts, seeds, sides, {name: pictures[name][place] for name in (base, main)}, spec.judge,
                          medium) for place in wanted}
    return [tiles[place] for place in best], [tiles[place] for place in worst]


def _number(score: float) -> float | None:
    return None if np.isnan(score) else float(score)


def statistics_dict(result: Paired) -> dict[str, Any]:
    """For report.json."""
    return {**asdict(result), "sentence": result.sentence}
