"""Answers from a masked diffusion language model, by LLaDA's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..types import Cond


@dataclass(frozen=True, kw_only=True)
class TextSampler:
    """length: tokens of an answer, end token included. steps: passes, spread over the blocks; each settles as many tokens as
    remain over the steps that remain. block: tokens that are settled before the next ones to their right (semi-autoregressive
    remasking); null is the whole answer at once. temperature: of the tokens; 0 takes the likeliest.

    At each step every masked token is drawn, and some stay (LLaDA, arXiv 2502.09992; its released generate.py, without
    guidance). remasking: "low_confidence" keeps those that the model is surest of (its probability, without temperature):
    that seeks out the likely answers whatever the temperature. "random" keeps any: at temperature 1 and a token a step these
    are samples of the model, over random orders.
    """

    length: int = 128
    steps: int = 128
    block: int | None = None
    temperature: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.block is not None and (self.block < 1 or self.length % self.block):
            raise ValueError(f"block must divide length ({self.length}), got {self.block}")
        blocks = self.length // (self.block or self.length)
        if self.steps % blocks or not blocks <= self.steps <= self.length:
            raise ValueError(f"steps must be a multiple of the {blocks} blocks and at most length ({self.length}), got "
                             f"{self.steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    @torch.no_grad()
    def __call__(self, ctx, name: str, prompts: Sequence[Sequence[int]], keys: Tensor, device=None) -> list[list[int]]:
        """prompts: token ids of N prompts; keys: [N, J] int64, which seed each answer by itself -> N answers of ``length``
        tokens. ctx: ``predict``, ``process`` and ``seed``; name: the weight set.
        """
        if not prompts:
            return []
        mask, starts = ctx.process.mask_id, torch.tensor([len(prompt) for prompt in prompts])
        width = int(starts.max()) + self.length
        x = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in zip(x, prompts, strict=True):
            row[:len(prompt)], row[len(prompt):len(prompt) + self.length] = torch.tensor(prompt), mask
        place = torch.arange(width)[None] - starts[:, None]  # of a token in its answer
        cond = Cond(extra={"attended": (place < self.length).to(device)})
        block = self.block or self.length
        steps = self.steps * block // self.length
        for number in range(self.steps):
            inside = (place >= 0) & (place < block * (number // steps + 1))
            masked = x == mask
            share = torch.full((len(x),), (self.steps - number) / self.steps)
            logits = ctx.predict(name, x.to(device), share.to(device), cond).double().cpu()
            token = self._drawn(logits, ctx.seed, keys, number, masked)
            sure = torch.full(x.shape, -1.0, dtype=torch.float64)
            sure[masked] = self._confidence(logits, token, ctx.seed, keys, number, masked)
            filled = x.masked_scatter(masked, token)
            left = steps - number % steps
            for row in range(len(x)):
                waiting = int((masked & inside)[row].sum())
                best = sure[row].masked_fill(~inside[row], -1).topk(-(-waiting // left)).indices
                x[row, best] = filled[row, best]
        return [row[start:start + self.length].tolist() for row, start in zip(x, starts.tolist(), strict=True)]

    def _confidence(self, logits: Tensor, token: Tensor, seed: int, keys: Tensor, step: int, masked: Tensor) -> Tensor:
        """[M] in [0, 1]: the largest stay."""
        if self.remasking == "low_confidence":
            return logits.softmax(1).gather(1, token[:, None])[:, 0]
        return torch.cat([torch.from_numpy(rng.generator(seed, "remasking", *key, step).random(n))
                          for n, key in zip(masked.sum(1).tolist(), keys.tolist(), strict=True)])

    def _drawn(self, logits: Tensor, seed: int, keys: Tensor, step: int, masked: Tensor) -> Tensor:
        """[M] tokens. The Gumbel noise is in double precision: in single it cuts off the tails (arXiv 2409.02908)."""
        if self.temperature == 0:
            return logits.argmax(1)
        counts, words = masked.sum(1).tolist(), logits.shape[1]
        uniform = [rng.generator(seed, "token", *key, step).random((n, words))
                   for n, key in zip(counts, keys.tolist(), strict=True)]
        gumbel = -np.log(-np.log(np.clip(np.concatenate(uniform), 1e-300, None)))
        return (logits + self.temperature * torch.from_numpy(gumbel)).argmax(1)
