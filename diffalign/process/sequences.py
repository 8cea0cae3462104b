"""Where in its distribution each draw's time lies: numbers u in [0, 1), which ``Times.at`` turns into times.

draw(seed, keys, index) -> [N] float64. keys: [N, 3] (row, visit, draw). index: [N] int64, the draw's place in the whole run
(group's place * draws + draw) or None for groups outside a run. Each u is uniform by itself, so every sequence leaves the
objective's expectation alone; what they lower is the variance of a step's mean. A place belongs to the run, so micro-batches
and processes change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng

GOLDEN = (5**0.5 - 1) / 2


def _placed(index: Tensor | None, who: str) -> Tensor:
    if index is None:
        raise ValueError(f"{who} needs the groups' places in the run, and this batch has none")
    return index


@dataclass(frozen=True)
class Random:
    """Independent draws: a function of the row and its visit."""

    def draw(self, seed: int, keys: Tensor, index: Tensor | None) -> Tensor:
        return rng.uniform(seed, "time", keys)


@dataclass(frozen=True, kw_only=True)
class Stratified:
    """Every ``strata`` consecutive draws of the run fall one into each of ``strata`` equal parts, in keyed random order.

    With strata = groups of a step x draws, each step is stratified.
    """

    strata: int = 16

    def __post_init__(self):
        if not 2 <= self.strata <= 2**20:
            raise ValueError(f"strata must be at least 2 and at most {2**20:,}, got {self.strata}")

    def draw(self, seed: int, keys: Tensor, index: Tensor | None) -> Tensor:
        index = _placed(index, "stratified sampling")
        block, inside = index // self.strata, index % self.strata
        orders = {b: torch.from_numpy(rng.permutation(self.strata, seed, "strata", b)) for b in block.unique().tolist()}
        stratum = torch.stack([orders[b][i] for b, i in zip(block.tolist(), inside.tolist(), strict=True)])
        return (stratum.double() + rng.uniform(seed, "time", keys)) / self.strata


@dataclass(frozen=True)
class Antithetic:
    """Consecutive draws of the run are mirror images: u and 1 - u."""

    def draw(self, seed: int, keys: Tensor, index: Tensor | None) -> Tensor:
        index = _placed(index, "antithetic sampling")
        u = rng.uniform(seed, "antithetic", (index // 2)[:, None])
        return torch.where(index % 2 == 0, u, 1 - u)


@dataclass(frozen=True)
class LowDiscrepancy:
    """A golden-ratio (Kronecker) sequence over the run with a keyed start: any window of draws covers [0, 1) evenly."""

    def draw(self, seed: int, keys: Tensor, index: Tensor | None) -> Tensor:
        start = rng.uniform(seed, "low_discrepancy", torch.zeros(1, 1, dtype=torch.int64))
        return (start + _placed(index, "low-discrepancy sampling").double() * GOLDEN) % 1.0


Sequence = Random | Stratified | Antithetic | LowDiscrepancy
