"""What the labels of a data set look like beside a reward: agreement, gaps, who wins, and pairs worth looking at."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .. import rng
from ..data.columns import Row, normalised
from ..rewards import Reward, judged
from .statistics import wilson

BINS = 20
SHOWN = 640   # pixels of the longer side of a picture that is kept to be shown
SCORED = 64   # pairs that a reward is given at once
NAMED = 20
FEWEST = 20   # prompts, or groups, below which nothing is called a problem


@dataclass(frozen=True, kw_only=True)
class Example:
    """A pair to look at. gap: the reward's, or the data's score of best minus worst; below 0 the reward disagrees with the
    label. scores: of best and worst, by whatever gave the gap; None where nothing did.
    """

    prompt: str
    where: str
    best: Image.Image
    worst: Image.Image | None
    gap: float | None = None
    scores: tuple[float, float] | None = None


@dataclass
class Examples:
    """Collects the pairs of a page, ``count`` of each kind: gaps that are widest and narrowest, disagreements, any."""

    count: int
    seed: int = 0
    seen: int = 0
    _heaps: dict[str, list] = field(default_factory=lambda: {name: [] for name in ("widest", "narrowest", "disagreements")})
    random: list[Example] = field(default_factory=list)

    def offer(self, example: Example) -> None:
        self.seen += 1
        if not self.count:
            return
        example = _small(example)
        place = len(self.random)
        if place == self.count:  # a keyed reservoir: every pair has the same chance
            place = int(rng.generator(self.seed, "examples", self.seen).integers(self.seen))
        if place < self.count:
            self.random[place:place + 1] = [example]
        if example.gap is None or math.isnan(example.gap):
            return
        for name, rank in (("widest", example.gap), ("narrowest", -abs(example.gap)), ("disagreements", -example.gap)):
            if name == "disagreements" and example.gap >= 0:
                continue
            heap = self._heaps[name]
            (heapq.heappush if len(heap) < self.count else heapq.heappushpop)(heap, (rank, -self.seen, example))

    def kinds(self) -> dict[str, list[Example]]:
        """The pairs by kind, the most telling first; kinds without any are left out."""
        best = {name: [entry[2] for entry in sorted(heap, key=lambda entry: entry[:2], reverse=True)]
                for name, heap in self._heaps.items()}
        return {name: found for name, found in {**best, "random": self.random}.items() if found}


def _small(example: Example) -> Example:
    def small(image: Image.Image | None) -> Image.Image | None:
        if image is not None and max(image.size) > SHOWN:
            image = image.copy()
            image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        return image
    return Example(prompt=example.prompt, where=example.where, best=small(example.best), worst=small(example.worst),
                   gap=example.gap, scores=example.scores)


@dataclass
class Labels:
    """Takes every group once, in order, and says at the end what the labels are like."""

    reward: Reward | None
    examples: Examples
    gaps: list[float] = field(default_factory=list)
    agreed: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    against: list[tuple[float, str]] = field(default_factory=list)
    equal: int = 0
    unscored: int = 0
    candidates: Counter = field(default_factory=Counter)
    mixed: Counter = field(default_factory=Counter)
    wins: Counter = field(default_factory=Counter)
    _waiting: list[tuple[Row, Image.Image, Image.Image]] = field(default_factory=list)

    def take(self, row: Row, pictures: Sequence[Image.Image], layout: str) -> None:
        """pictures: the group's, decoded. Raises UserError children of the reward."""
        self._models(row)
        best, worst = (row.utility.index(pick(row.utility)) for pick in (max, min))
        if len(pictures) == 1 or row.tie:
            self.examples.offer(Example(prompt=row.prompt, where=row.where, best=pictures[best],
                                        worst=pictures[1 - best] if len(pictures) == 2 else None))
        elif self.reward is not None:
            self._waiting.append((row, pictures[best], pictures[worst]))
            if len(self._waiting) == SCORED:
                self._score()
        else:
            told = layout in ("scored", "pickapic_scored")
            scores = (row.utility[best], row.utility[worst]) if told else None
            gap = scores[0] - scores[1] if told else None
            if told:
                self.gaps.append(gap)
            self.examples.offer(Example(prompt=row.prompt, where=row.where, best=pictures[best], worst=pictures[worst],
                                        gap=gap, scores=scores))

    @property
    def problems(self) -> list[str]:
        """What a run would not see: labels that a reward contradicts, a source that nearly always wins."""
        found, told = [], self._agreement()
        if told is not None and told["prompts"] >= FEWEST and told["high"] < 0.5:
            found.append(f"the labels agree with {told['reward']} on only {100 * told['share']:.0f}% of the prompts (95% "
                         f"interval {100 * told['low']:.0f}% to {100 * told['high']:.0f}%): are winner and loser swapped?")
        found += [f"{name} wins {100 * one['wins']:.0f}% of the groups in which it meets other models: the labels may teach "
                  "to look like it" for name, one in self._shares().items() if one["groups"] >= FEWEST and one["wins"] >= 0.9]
        return found

    def _score(self) -> None:
        """The reward's word on the pairs that wait."""
        if not self._waiting:
            return
        images = [image for _, *sides in self._waiting for image in sides]
        prompts = [row.prompt for row, *_ in self._waiting for _ in range(2)]
        scores = judged(self.reward, images, prompts).view(-1, 2).tolist()
        for (row, best, worst), (high, low) in zip(self._waiting, scores):
            gap = high - low
            self.examples.offer(Example(prompt=row.prompt, where=row.where, best=best, worst=worst, gap=gap,
                                        scores=(high, low)))
            if math.isnan(gap):
                self.unscored += 1
                continue
            self.gaps.append(gap)
            self.equal += gap == 0
            self.agreed[normalised(row.prompt)].append(0.5 if gap == 0 else float(gap > 0))
            if gap < 0:
                heapq.heappush(self.against, (-gap, row.where))
                if len(self.against) > NAMED:
                    heapq.heappop(self.against)
        self._waiting.clear()

    def _models(self, row: Row) -> None:
        """Who drew the candidates, and who wins against another one."""
        self.candidates.update(name for name in row.models if name)
        names = {name for name in row.models if name}
        if len(names) > 1 and not row.tie:
            self.mixed.update(names)
            self.wins[row.models[row.utility.index(max(row.utility))]] += 1

    def result(self) -> dict:
        """{"agreement", "gaps", "source_models"}, ready for JSON; None or empty where there is nothing to tell."""
        self._score()
        return {"agreement": self._agreement(), "gaps": self._histogram(), "source_models": self._shares()}

    def _agreement(self) -> dict | None:
        """The share of prompts on which the reward agrees with the labels: a prompt's pairs are averaged first, since they are
        not independent; ties of the reward count one half; a 95 % Wilson interval over prompts."""
        if self.reward is None:
            return None
        told = [float(np.mean(values)) for values in self.agreed.values()]
        share = float(np.mean(told)) if told else None
        interval = wilson(share, len(told)) if told else (None, None)
        return {"reward": self.reward.name, "share": share, "low": interval[0], "high": interval[1], "prompts": len(told),
                "pairs": len(self.gaps), "equal": self.equal, "not_scored": self.unscored,
                "disagreements": [f"{where} (by {gap:.4g})" for gap, where in sorted(self.against, reverse=True)]}

    def _histogram(self) -> dict | None:
        if not self.gaps:
            return None
        least, median, most = np.quantile(self.gaps, [0, 0.5, 1])
        room = 0.5 if least == most else 0.0
        # edges of our own: numpy refuses to make them where gaps lie closer than their size can be told apart
        counts, edges = np.histogram(self.gaps, bins=np.linspace(least - room, most + room, BINS + 1))
        return {"of": self.reward.name if self.reward is not None else "scores", "counts": counts.tolist(),
                "edges": [float(edge) for edge in edges], "least": float(least), "median": float(median), "most": float(most)}

    def _shares(self) -> dict:
        """By the model that drew them: its share of the pictures, and how often it wins where it meets another."""
        total = sum(self.candidates.values())
        return {name: {"share": count / total, "groups": self.mixed[name],
                       "wins": self.wins[name] / self.mixed[name] if self.mixed[name] else None}
                for name, count in self.candidates.most_common(NAMED)}
