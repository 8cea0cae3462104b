"""Where the candidates of a group come from: all from disk, or some drawn by the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..objectives.sft import winners
from ..rewards import Reward
from ..sampling.latents import Sampler
from ..types import Batch, Cond, Steps
from .offline import Offline


@dataclass(frozen=True)
class Stored:
    """The data set's own candidates."""

    k: int | None = None  # as many as the data has
    sampler = None
    reads_prompts_only = False
    drawn = 0  # candidates of a group that the model draws


@dataclass(frozen=True, kw_only=True)
class SemiPolicy:
    """Each group's winner beside one sample of the model in the loser's place (SePPO, arXiv 2410.05255; offline PSO).

    weights: which set draws: "reference" (SePPO: a past checkpoint), "origin" (PSO: the model before tuning) or "current".
    The data needs winners only. Samples stay latents, winners went through the encoder once.
    """

    sampler: Sampler = Sampler()
    weights: Literal["reference", "origin", "current"] = "reference"
    k = 2
    drawn = 1
    reads_prompts_only = False


@dataclass(frozen=True, kw_only=True)
class Online:
    """``k`` samples of the current model for each prompt, ranked by a reward; of the data set only the prompts are read, so a
    text file of prompts will do.

    reward: what ranks the samples. The group's best and worst are what BestWorst pairs; a group of equal scores, or with one
    score alone, is left out.
    """

    reward: Reward
    k: int = 2
    sampler: Sampler = Sampler()
    weights: Literal["current", "reference", "origin"] = "current"
    reads_prompts_only = True

    def __post_init__(self):
        if not 2 <= self.k <= 1024:
            raise ValueError(f"k must be at least 2 and at most 1024, got {self.k}")

    @property
    def drawn(self) -> int:
        return self.k


def sizes_of_samples(extra: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Per-candidate conditions [B, any, ...] of data -> [B, k, ...] of pictures that the model draws for the same prompts."""
    return {name: _drawn(name, x[:, :1]).repeat(1, k, *[1] * (x.dim() - 2)) for name, x in extra.items()}


def _drawn(name: str, x: Tensor) -> Tensor:
    """SDXL's sizes as its pipeline has them for a picture it draws: (height, width, 0, 0, height, width) of the target."""
    return torch.cat([x[..., 4:6], torch.zeros_like(x[..., 2:4]), x[..., 4:6]], dim=-1) if name == "time_ids" else x


def _differ(utility: Tensor) -> Tensor:
    """[B, 1]: whether a group's known utilities tell two samples apart. A group that says nothing must not count among those
    that a step's loss is divided by."""
    low, high = (utility.masked_fill(~utility.isfinite(), fill) for fill in (torch.inf, -torch.inf))
    return low.amin(1, keepdim=True) < high.amax(1, keepdim=True)


Draw = Callable[[Cond, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]
Score = Callable[[Tensor, Sequence[str]], Tensor]


def along(batch: Batch, states: Tensor, levels: Tensor, sampler: Sampler) -> Batch:
    """A group for every step of every group, steps outermost: states [B, K, L, *S] at levels [L] -> (L - 1) * B groups.

    The last step, from the lowest level to the image, has no density and is left out.
    """
    count = len(levels) - 1

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat(count, *[1] * (x.dim() - 1))

    cond = replace(batch.cond, tokens=again(batch.cond.tokens), pooled=again(batch.cond.pooled),
                   extra={name: again(x) for name, x in batch.cond.extra.items()})
    before, after = (states[:, :, part].movedim(2, 0).flatten(0, 1) for part in (slice(0, -1), slice(1, None)))
    t, s = (part.cpu().repeat_interleave(batch.groups) for part in (levels[:-1], levels[1:]))
    return replace(batch, x0=again(batch.x0), cond=cond, utility=again(batch.utility), valid=again(batch.valid),
                   key=again(batch.key), soft=again(batch.soft), place=again(batch.place),
                   steps=Steps(x_t=before, x_s=after, t=t, s=s, solver=sampler.solver, eta=sampler.eta))


class Sampled:
    """A source whose groups hold samples of the model.

    draw(cond of N rows, keys [N, 3], shape) -> x0 [N, *shape] and the path [N, levels, *shape] on the CPU, with the weights
    of that moment. As they, and the keys, are in every checkpoint, it is exact at every step. score(x0 [N, *shape], prompts)
    -> [N]; NaN leaves one out. levels: the sampler's noise levels, where the batch is to hold the steps of the samples: a
    group for each step, from level to level, the image's own ranking at every one.
    """

    pure = False  # a step's batches depend on the weights, so they are not read ahead

    def __init__(self, stored: Offline, spec: SemiPolicy | Online, draw: Draw, score: Score | None = None, *,
                 levels: Tensor | None = None):
        self.stored, self.spec, self.draw, self.score, self.levels = stored, spec, draw, score, levels
        self.identity, self.k, self.soft, self.groups = stored.identity, spec.k, False, stored.groups
        self.elements = stored.elements

    def take(self, step: int) -> list[Batch]:
        micros = self.stored.take(step)
        if isinstance(self.spec, SemiPolicy):
            return [self._beside_winner(batch) for batch in micros]
        return [self._ranked(batch, prompts) for batch, prompts in zip(micros, self.stored.prompts(step), strict=True)]

    def boundary(self, step: int) -> bool:
        return True

    def _beside_winner(self, batch: Batch) -> Batch:
        group = torch.arange(batch.groups)
        winner, has_winner = torch.zeros_like(group), torch.zeros_like(group, dtype=torch.bool)
        where, best = winners(batch)  # the first of a tie has won nothing
        winner[where], has_winner[where] = best, True
        cond = replace(batch.cond, extra={name: x[group, winner][:, None].repeat(1, 2, *[1] * (x.dim() - 2))
                                          for name, x in batch.cond.extra.items()})
        own, _ = self._samples(batch, cond, 1)
        return replace(batch, x0=torch.cat([batch.x0[group, winner][:, None], own], dim=1), cond=cond, soft=None,
                       utility=torch.tensor([[1.0, 0.0]]).repeat(batch.groups, 1),
                       valid=has_winner[:, None].repeat(1, 2))

    def _ranked(self, batch: Batch, prompts: Sequence[str]) -> Batch:
        k = self.spec.k
        cond = replace(batch.cond, extra=sizes_of_samples(batch.cond.extra, k))
        x0, states = self._samples(batch, cond, k)
        texts = [prompt for prompt in prompts for _ in range(k)]
        utility = self.score(x0.flatten(0, 1), texts).float().view(batch.groups, k)
        valid = utility.isfinite() & _differ(utility) & batch.valid.any(1, keepdim=True)
        batch = replace(batch, x0=x0, cond=cond, utility=utility.nan_to_num(0.0), valid=valid, soft=None)
        return batch if self.levels is None else along(batch, states, self.levels, self.spec.sampler)

    def _samples(self, batch: Batch, cond: Cond, k: int) -> tuple[Tensor, Tensor]:
        """x0 [B, k, *S] and paths [B, k, levels, *S]; a key is (row, visit, candidate)."""
        candidate = torch.arange(k).repeat(batch.groups)[:, None]
        keys = torch.cat([batch.key.repeat_interleave(k, dim=0), candidate], dim=1)
        some = replace(cond, extra={name: x[:, :k] for name, x in cond.extra.items()})
        x0, states = self.draw(some.rows(k), keys, tuple(batch.x0.shape[2:]))
        return x0.view(batch.groups, k, *x0.shape[1:]), states.view(batch.groups, k, *states.shape[1:])
