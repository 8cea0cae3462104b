"""The exact log-likelihood of a clip's codec tokens under an autoregressive model with MusicGen's delay pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Batch, Estimate
from .base import shares


@dataclass(frozen=True, kw_only=True)
class CodeLikelihood:
    """log p(codes | prompt) in nats per clip: the sum over C codebooks and T frames, exact, so without draws and times.

    tail: whether the codes of the last C - 1 columns count. transformers' loss takes all C * T; audiocraft trained its
    checkpoints on columns in which every codebook has a code, T - k of codebook k: false for those, since their heads never
    learned the rest. A clip's sum grows with its length: compare clips of one length.
    """

    tail: bool = True
    draws = 1

    def __call__(self, batch: Batch, ctx, against: Mapping[str, float] | str | None, anchor: str | None = None) -> Estimate:
        """batch: x0 [B, K, C, T] -> Estimate, all [B, K]; ``error`` is minus the log-likelihood per code, ``t`` is 0.

        against: as in ``DenoisingELBO``. anchor: estimated is KL(policy || that set) over the whole vocabulary at every code,
        in nats per clip: MusicRL's penalty (arXiv 2402.04229), on the clip at hand.
        """
        against = shares(against)
        columns = ctx.process(batch.x0.flatten(0, 1))
        sets = dict.fromkeys((*against, *filter(None, (anchor,)), "policy"))
        logits = {name: self._logits(ctx, name, columns, batch) for name in sets}
        kept = self.kept(columns, ctx.process.start_id)
        found = {name: self._summed(self._tokens(logits[name], columns, kept), batch) for name in (*against, "policy")}
        reference = sum(share * found[name] for name, share in against.items()) if against else None
        count = kept.flatten(1).sum(1).view(batch.groups, batch.k)
        return Estimate(
            policy=found["policy"], reference=reference, error=-found["policy"] / count,
            reference_error=None if reference is None else -reference / count, t=torch.zeros_like(found["policy"]),
            anchor=None if anchor is None else self._summed(_divergence(logits["policy"], logits[anchor]) * kept, batch))

    def kept(self, columns: Tensor, start_id: int) -> Tensor:
        """columns: [N, C, S + 1] -> [N, C, S] bool, which of the predicted ones are codes that count."""
        codes = columns[..., 1:] != start_id
        if self.tail:
            return codes
        return codes & codes[:, :1]  # the first codebook ends first: beyond it columns are no longer whole

    def _logits(self, ctx, name: str, columns: Tensor, batch: Batch) -> Tensor:
        """[N, C, S, V] float32."""
        given = columns[..., :-1]
        return ctx.predict(name, given, torch.zeros(len(given), device=given.device), batch.cond.rows(batch.k)).float()

    def _tokens(self, logits: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
        """[N, C, S] log-probabilities, 0 where there is no code."""
        target = columns[..., 1:].masked_fill(~kept, -100)
        return -F.cross_entropy(logits.movedim(-1, 1), target, ignore_index=-100, reduction="none")

    def _summed(self, tokens: Tensor, batch: Batch) -> Tensor:
        return tokens.flatten(1).sum(1).view(batch.groups, batch.k)


def _divergence(policy: Tensor, other: Tensor) -> Tensor:
    policy, other = policy.log_softmax(-1), other.log_softmax(-1)
    return (policy.exp() * (policy - other)).sum(-1)
