"""How candidates are noised. Shared noise inside a group lowers the variance of the margin (notation.md section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng
from ..types import Batch, Noised
from .times import Times


def _draw_keys(key: Tensor, draws: int) -> Tensor:
    """[B, 2] -> [draws*B, 3] (row, visit, draw), draws outermost."""
    numbers = torch.arange(draws).repeat_interleave(len(key))
    return torch.cat([key.cpu().repeat(draws, 1), numbers[:, None]], dim=1)


def _noised(batch: Batch, process, t: Tensor, eps: Tensor, draws: int) -> Noised:
    """t: [draws*B]; eps: [draws*B*K, *S], on the CPU -> rows ordered (draw, group, candidate)."""
    x0 = batch.x0.flatten(0, 1)
    t = t.repeat_interleave(batch.k).to(x0.device)
    return process.noise(x0.repeat(draws, *[1] * (x0.dim() - 1)), t, eps.to(x0.device, non_blocking=True))


@dataclass(frozen=True)
class Shared:
    """One time and one noise per (group, draw), the same for every candidate and every weight set."""

    def draw(self, batch: Batch, process, times: Times, seed: int, draws: int) -> Noised:
        keys = _draw_keys(batch.key, draws)
        eps = rng.normal(seed, "noise", keys, tuple(batch.x0.shape[2:]))
        return _noised(batch, process, times.draw(seed, keys), eps.repeat_interleave(batch.k, dim=0), draws)


@dataclass(frozen=True)
class Independent:
    """One time per (group, draw), own noise per candidate (Diffusion-DPO Eq. 14 as written)."""

    def draw(self, batch: Batch, process, times: Times, seed: int, draws: int) -> Noised:
        keys = _draw_keys(batch.key, draws)
        candidate = torch.arange(batch.k).repeat(len(keys))[:, None]
        eps = rng.normal(seed, "noise", torch.cat([keys.repeat_interleave(batch.k, dim=0), candidate], dim=1),
                         tuple(batch.x0.shape[2:]))
        return _noised(batch, process, times.draw(seed, keys), eps, draws)


NoisePlan = Shared | Independent
