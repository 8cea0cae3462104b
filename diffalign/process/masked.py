"""The forward process of masked diffusion: tokens of the answer are replaced by a mask token, those of the prompt never.

Noise level t in (0, 1] is the share of masked tokens. Randomness is keyed: a row's mask depends on the seed and its own key
alone, not on padding, batch or process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng
from ..types import Masked, carried


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Masked (absorbing) diffusion with the linear schedule (LLaDA, arXiv 2502.09992; VRPO, arXiv 2505.19223, section 2).

    Two ways to draw a mask, with the weights that make sum over masked tokens of log p(token) an estimate of the same bound:
    ``exactly`` l of L tokens, weight L/l, and ``independently`` each token with probability t, weight 1/t.
    x0: [N, L] int64; answer: [N, L] bool; keys: [N, J] int64 on the CPU. mask_id: the mask token's id.
    """

    mask_id: int

    def exactly(self, x0: Tensor, answer: Tensor, u: Tensor, seed: int, keys: Tensor) -> Masked:
        """u: [N] in [0, 1), which of the l = 1 .. L it is. Every weight is at most L, so the variance is finite."""
        length = answer.sum(1).cpu()
        count = (1 + (u.cpu() * length).floor().long()).clamp(max=length)
        order = [rng.permutation(n, seed, "mask", *key) for n, key in zip(length.tolist(), keys.tolist(), strict=True)]
        chosen = [torch.from_numpy(row < k) for row, k in zip(order, count.tolist(), strict=True)]
        return self._masked(x0, answer, chosen, t=count / length, weight=length / count)

    def independently(self, x0: Tensor, answer: Tensor, t: Tensor, seed: int, keys: Tensor) -> Masked:
        """t: [N] in (0, 1]. The weight has no bound: times from 0 on give an infinite variance (log-divergent at t = 0)."""
        t, length = t.cpu(), answer.sum(1).tolist()
        draws = [rng.generator(seed, "mask", *key).random(n) for n, key in zip(length, keys.tolist(), strict=True)]
        chosen = [torch.from_numpy(row) < level for row, level in zip(draws, t.tolist(), strict=True)]
        return self._masked(x0, answer, chosen, t=t, weight=1 / t)

    def _masked(self, x0: Tensor, answer: Tensor, chosen: list[Tensor], t: Tensor, weight: Tensor) -> Masked:
        masked = torch.zeros_like(answer).masked_scatter(answer, carried(torch.cat(chosen), answer.device))
        return Masked(x0=x0, xt=x0.masked_fill(masked, self.mask_id), masked=masked,
                      places=masked.flatten().nonzero().squeeze(1), t=carried(t.float(), x0.device),
                      weight=carried(weight.float(), x0.device))
