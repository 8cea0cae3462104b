"""Clips from an autoregressive model of codec tokens, column by column of the delay pattern."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..errors import ModelError
from ..rewards.sound import SILENT
from ..types import Cond, Sound

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CodeSampler:
    """frames: T of a clip. temperature: of the codes; 1 draws from the very policy whose likelihood is computed, 0 takes the
    likeliest. No guidance and no top-k: samples of those are not the policy's.

    Every column reads all columns before it anew, which suits small models; transformers' ``generate`` keeps them in a cache.
    """

    frames: int = 64
    temperature: float = 1.0

    def __post_init__(self):
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    @torch.no_grad()
    def __call__(self, ctx, name: str, cond: Cond, keys: Tensor, device="cpu") -> Tensor:
        """cond: of N rows; keys: [N, J] int64, which seed each clip by itself -> codes [N, C, T] on the CPU. ctx: ``predict``,
        ``process`` and ``seed``; name: the weight set.
        """
        delay, cond = ctx.process, cond.to(device)
        columns = torch.full((len(keys), delay.codebooks, self.frames + delay.codebooks), delay.start_id)
        t = torch.zeros(len(keys), device=device)
        for at in range(1, columns.shape[2]):
            logits = ctx.predict(name, columns[..., :at].to(device), t, cond)[:, :, -1].double().cpu()
            drawn = self._drawn(logits, ctx.seed, keys, at)
            for k in range(delay.codebooks):  # codebook k has its codes at k+1 .. k+T
                if k + 1 <= at <= k + self.frames:
                    columns[:, k, at] = drawn[:, k]
        return delay.undo(columns)

    def _drawn(self, logits: Tensor, seed: int, keys: Tensor, column: int) -> Tensor:
        """logits: [N, C, V] -> [N, C]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        uniform = [rng.generator(seed, "code", *key, column).random(logits.shape[1:]) for key in keys.tolist()]
        gumbel = -np.log(-np.log(np.clip(np.stack(uniform), 1e-300, None)))
        return (logits + self.temperature * torch.from_numpy(gumbel)).argmax(-1)


def checked_sounds(waves: np.ndarray, rate: int, prompts: Sequence[str], seeds: Sequence[int]) -> list[Sound]:
    """waves: [n, channels, samples] of a model, at ``rate`` Hz. Raises ModelError for a clip with NaN; silent ones are warned
    of by name.
    """
    for what, prompt, seed in zip(waves, prompts, seeds, strict=True):
        if not np.isfinite(what).all():
            raise ModelError(f'the clip "{prompt[:60]}" (seed {seed}) holds NaN: the weights have diverged')
        if np.abs(what).max(initial=0) < SILENT:
            logger.warning('clip "%s" (seed %d) is silent', prompt[:60], seed)
    return [Sound(wave=np.ascontiguousarray(wave, np.float32), rate=rate) for wave in waves]
