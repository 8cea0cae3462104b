"""Pairwise preference objectives: a pair rule, a labeler and a link."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory
from .base import needs_scores, title_of
from .labels import Hard, Labels
from .links import Link, Logistic
from .pairs import BestWorst, Pairs

CENTRE, LAST, MEAN = "log_ratio", "pair_logit@0", "pair_logit@0.9"


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """loss = weight * link(scale * log-ratio of the winner, of the loser, beta), averaged over both orders by the label.

    With the logistic link this is Diffusion-DPO (arXiv 2311.12908, Eq. 14). beta is the reference code's: mean-reduced error
    and the factor 1/2 inside the estimate, so kappa = beta/2 (diffusion_dpo.md section 2; published 2000 to 5000).
    reference_free: compare likelihoods of the policy alone. centre: subtract the running mean of the log-ratio from both
    sides (BCO's shift; pointwise links alone see it; last step's value). Not with flip or loser_scale, which compare with 0.

    loser_scale: the loser's log-ratio counts so much (PSO's nu, arXiv 2410.03190; MaPPO). flip: SePPO's anchor criterion
    (arXiv 2410.05255), the loser's log-ratio times the sign of the winner's: while the policy denoises the winner worse than
    the reference does, the loser is pulled in, not pushed away ("indicator": left out). clip: probability ratios are kept
    inside [1 - clip, 1 + clip], where their gradient ends (D3PO's and PSO's 0.1, for step densities). on_policy: weight
    min(1, exp(on_policy * beta * (sum of both log-ratios))), the pair's importance under the policy, for pairs that the
    reference drew (after WPO, arXiv 2406.11827, whose token average has no counterpart here). dynamic: beta-DPO (arXiv
    2407.08639): beta * max(1e-3, 1 + dynamic * (last step's mean logit - its running mean)). None of these has a gradient.
    less_entropy: the label's own entropy is taken off, so that a pair judged just as its soft label says costs 0 with the
    logistic link: log 2 for a tie, as reward models' code does (PickScore, LRM). It moves no gradient.
    """

    beta: float
    link: Link = Logistic()
    pairs: Pairs = BestWorst()
    labels: Labels = Hard()
    reference_free: bool = False
    centre: bool = False
    loser_scale: float = 1.0
    flip: Literal["none", "sign", "indicator"] = "none"
    clip: float | None = None
    on_policy: float = 0.0
    dynamic: float = 0.0
    less_entropy: bool = False
    min_k = 2

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        for name in ("loser_scale", "on_policy", "dynamic"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip must lie between 0 and 1, got {self.clip}")
        if self.centre and (self.flip != "none" or self.loser_scale != 1):
            raise ValueError(f"centre moves the zero that {'flip' if self.flip != 'none' else 'loser_scale'} counts from; use "
                             "one of the two")
        if self.reference_free and (self.flip != "none" or self.on_policy):
            raise ValueError(f"{'flip' if self.flip != 'none' else 'on_policy'} compares with a reference; set "
                             "reference_free to false")

    @property
    def title(self) -> str:
        """The method's name in reports."""
        return title_of(self.link)

    @property
    def needs_scores(self) -> bool:
        return needs_scores(self.labels)

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        label = self.labels(batch, b, w, l)
        shift, beta = memory.read(CENTRE) if self.centre else 0.0, self._beta(memory)
        stretch = getattr(self.link, "stretch", 1.0)
        own = tuple(self._clipped(est.log_ratio[b, i]) for i in (w, l))
        winner, loser = ((ratio - shift) * label.scale for ratio in own)
        rows = self._both_orders(winner, loser, label.p, label.offset / (2 * beta * stretch), beta)
        rows = label.weight * (rows - _entropy(label.p) if self.less_entropy else rows)
        metrics = {} if self.flip == "none" else {"flipped": (own[0] < 0).float()}
        if self.on_policy:
            weight = torch.exp(self.on_policy * self.beta * (own[0] + own[1]).detach()).clamp(max=1)
            rows, metrics["on_policy"] = rows * weight, weight
        logit = (beta * stretch * (winner - self._as_loser(loser, winner)) - label.offset).detach()
        loss = Loss.from_rows(rows, b, batch, logit=logit, saturated=(logit.abs() > 5).float(), gradient=torch.sigmoid(-logit),
                              **metrics)
        return replace(loss, observed=self._observed(*(ratio.detach() for ratio in own)))

    def _clipped(self, ratio: Tensor) -> Tensor:
        return ratio if self.clip is None else ratio.clamp(math.log1p(-self.clip), math.log1p(self.clip))

    def _beta(self, memory: Memory) -> float:
        if not self.dynamic:
            return self.beta
        return self.beta * max(1e-3, 1 + self.dynamic * (memory.read(LAST) - memory.read(MEAN)))

    def _as_loser(self, loser: Tensor, winner: Tensor) -> Tensor:
        """The loser's log-ratio as it counts beside this winner; not at all where policy and reference are equal on that."""
        if self.flip == "none":
            return loser * self.loser_scale
        sign = winner.detach().sign()
        return loser * (self.loser_scale * (sign.clamp(min=0) if self.flip == "indicator" else sign))

    def _both_orders(self, winner: Tensor, loser: Tensor, p: Tensor, half: Tensor, beta: float) -> Tensor:
        """The offset is split between the two sides, so that pointwise links see it as well. In the swapped order it is the
        other one that is scaled or flipped."""
        right = self.link(winner - half, self._as_loser(loser, winner) + half, beta)
        swapped = self.link(loser - half, self._as_loser(winner, loser) + half, beta)
        return p * right + (1 - p) * swapped

    def _observed(self, winner: Tensor, loser: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        def mean_of(x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sum(), x.new_full((), len(x))

        observed = {CENTRE: mean_of(torch.cat([winner, loser]))} if self.centre else {}
        if self.dynamic:
            observed |= {name: mean_of(self.beta * (winner - loser)) for name in (LAST, MEAN)}
        return observed


def _entropy(p: Tensor) -> Tensor:
    """Of a coin with probability p, in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
