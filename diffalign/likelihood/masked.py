"""The ELBO estimate of a masked diffusion language model: what VRPO compares in the place of log-likelihoods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..process import Random, Sequence, candidate_keys, draw_keys
from ..types import Batch, Estimate, Masked
from .base import shares


@dataclass(frozen=True, kw_only=True)
class MaskedELBO:
    """A lower bound of log p(answer | prompt), in nats per answer: a sum over its tokens (LLaDA 1.5, arXiv 2505.19223).

    form: "count" masks exactly l of the L answer tokens, l uniform in 1..L, and weighs their log-probabilities by L/l:
    unbiased for the bound, of finite variance, used by LLaDA's likelihood code. "time" masks each with probability t uniform
    in [t_min, 1], weight 1/t: the same bound at t_min = 0, where its variance is infinite; t_min 1e-3 leaves out that share of
    the times (LLaDA's pre-training has the same floor).
    draws: n masks an answer, averaged inside the estimate, hence inside the link. masks_per_time: n_y of them share a time, so
    there are n / n_y times; 1 has the lowest variance at every n (VRPO's Proposition 1). sequence: how the times lie to each
    other; Stratified(strata=draws) spreads those of one answer. share_times: the candidates of a group have the same times;
    VRPO's are each answer's own. Masks are each candidate's own, as answers differ in length. References see the very same
    times and masks, and go first, without gradients: VRPO's third choice holds by construction.
    """

    form: Literal["count", "time"] = "count"
    draws: int = 8
    masks_per_time: int = 1
    sequence: Sequence = Random()
    share_times: bool = False
    t_min: float = 1e-3

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if self.masks_per_time < 1 or self.draws % self.masks_per_time:
            raise ValueError(f"masks_per_time must divide draws ({self.draws}), got {self.masks_per_time}")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must be at least 0 and below 1, got {self.t_min}")

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None, anchor: str | None = None) -> Estimate:
        """batch: B groups of K -> Estimate, all [B, K]; ``error`` is minus the bound per answer token, as LLaDA's SFT loss.

        against: as in ``DenoisingELBO``. anchor: estimated is KL(policy || that set) over the masked tokens, weighted like the
        bound, in nats per answer.
        """
        against = shares(against)
        masked = self.masked(batch, ctx)
        sets = dict.fromkeys((*against, *filter(None, (anchor,)), "policy"))
        logits = {name: self.predict(ctx, name, masked, batch) for name in sets}
        bounds = {name: self.bound(logits[name], masked, batch).mean(0) for name in (*against, "policy")}
        reference = sum(share * bounds[name] for name, share in against.items()) if against else None
        length = batch.cond.extra["answer"].sum(2)
        return Estimate(
            policy=bounds["policy"], reference=reference, error=-bounds["policy"] / length,
            reference_error=None if reference is None else -reference / length,
            t=self._fold(masked.t, batch).mean(0),
            anchor=None if anchor is None else self._divergence(logits["policy"], logits[anchor], masked, batch).mean(0))

    def masked(self, batch: Batch, ctx) -> Masked:
        """The masked candidates, rows ordered (draw, group, candidate): a function of keys, places and seed."""
        keys = candidate_keys(batch, draw_keys(batch.key, self.draws))
        host = batch.labels  # masks are drawn on the CPU, and their sizes decide shapes
        rows = (host.x0.flatten(0, 1).repeat(self.draws, 1), host.cond.rows(batch.k, self.draws).extra["answer"])
        u = self._levels(batch, keys, ctx.seed)
        if self.form == "count":
            return ctx.process.exactly(*rows, u, ctx.seed, keys).to(batch.x0.device)
        t = (self.t_min + (1 - self.t_min) * u).clamp(min=torch.finfo(torch.float64).tiny)
        return ctx.process.independently(*rows, t, ctx.seed, keys).to(batch.x0.device)

    def _levels(self, batch: Batch, keys: Tensor, seed: int) -> Tensor:
        """[draws*B*K] float64 in [0, 1): the draws of a candidate lie next to each other in the run's sequence."""
        times, candidates = self.draws // self.masks_per_time, 1 if self.share_times else batch.k
        keys = keys.clone()
        keys[:, 2] //= self.masks_per_time
        keys[:, 3] %= candidates
        if batch.place is None:
            return self.sequence.draw(seed, keys, None)
        place = batch.place.cpu().repeat_interleave(batch.k).repeat(self.draws)
        return self.sequence.draw(seed, keys, (place * candidates + keys[:, 3]) * times + keys[:, 2])

    def predict(self, ctx, name: str, masked: Masked, batch: Batch) -> Tensor:
        """[M, V] float32 logits of the M masked tokens, row by row."""
        return ctx.predict(name, masked.xt, masked.t, batch.cond.rows(batch.k, self.draws)).float()

    def bound(self, logits: Tensor, masked: Masked, batch: Batch) -> Tensor:
        """One draw's estimate each: [draws, B, K] nats per answer."""
        return self._summed(-torch.nn.functional.cross_entropy(logits, masked.x0.flatten()[masked.places],
                                                              reduction="none"), masked, batch)

    def _divergence(self, policy: Tensor, other: Tensor, masked: Masked, batch: Batch) -> Tensor:
        policy, other = policy.log_softmax(1), other.log_softmax(1)
        return self._summed((policy.exp() * (policy - other)).sum(1), masked, batch)

    def _summed(self, tokens: Tensor, masked: Masked, batch: Batch) -> Tensor:
        """tokens: [M] -> weighted sums over each row's masked tokens."""
        row = masked.places // masked.x0.shape[1]
        return self._fold(masked.weight * tokens.new_zeros(len(masked.x0)).index_add(0, row, tokens), batch)

    def _fold(self, rows: Tensor, batch: Batch) -> Tensor:
        return rows.view(self.draws, batch.groups, batch.k)
