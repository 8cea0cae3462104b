"""MaPO: reference-free margin objective (arXiv 2406.06424), in both published variants. They are different objectives.

Deviation from the released code: x/(exp(x)-1) is evaluated with expm1 and a series near 0, where the code returns NaN.
Soft labels, which neither variant knows, give the mean of both orders' losses: else a tie would be a win of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Batch, Estimate, Loss, Memory
from .pairs import BestWorst, Pairs


def odds(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) for x >= 0: 1 at 0, falling to 0; finite with finite gradient everywhere."""
    small = x < 1e-3
    safe = torch.where(small, torch.ones_like(x), x).clamp(max=80.0)  # exp overflows float32 above 88
    return torch.where(small, 1 - x / 2 + x * x / 12, safe / torch.expm1(safe))


def expected(rows: Callable[[Tensor, Tensor], Tensor], e_w: Tensor, e_l: Tensor, soft: Tensor | None) -> Tensor:
    """rows(error of the preferred, error of the other), averaged over who is preferred. soft: [P] or None, certain."""
    return rows(e_w, e_l) if soft is None else soft * rows(e_w, e_l) + (1 - soft) * rows(e_l, e_w)


@dataclass(frozen=True, kw_only=True)
class MaPO:
    """Released code (variant "code"): ell_w - beta * logsigmoid(horizon * (f(ell_w) - f(ell_l))), f(l) = odds(snr * l).

    beta: weight of the margin (code's beta_mapo, 0.1). horizon: T of the training schedule. snr: constant signal-to-noise
    weight. A reference-free DPO logit with kappa = horizon * snr / 2 = 250 at small errors, plus SFT on winners.
    """

    beta: float = 0.1
    horizon: float = 1000.0
    snr: float = 0.5
    pairs: Pairs = BestWorst()
    title = "MaPO"
    reference_free = True
    min_k = 2
    needs_scores = False
    reads_weighting = False

    def __post_init__(self):
        if not self.beta >= 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        e_w, e_l = est.error[b, w], est.error[b, l]
        logit = self._logit(e_w, e_l)
        rows = expected(lambda w, l: w - self.beta * F.logsigmoid(self._logit(w, l)), e_w, e_l,
                         None if batch.soft is None else batch.soft[b])
        return Loss.from_rows(rows, b, batch, logit=logit, saturated=(logit.abs() > 5).float(), winner_error=e_w)

    def _logit(self, e_w: Tensor, e_l: Tensor) -> Tensor:
        return self.horizon * (odds(self.snr * e_w) - odds(self.snr * e_l))


@dataclass(frozen=True, kw_only=True)
class MaPOAAAI:
    """Paper v2 / AAAI 2026 (variant "aaai"): ell_w - 1/beta * logsigmoid(phi(ell_w) - phi(ell_l)), phi(l) = odds(l)^beta.

    beta: 8 (general) to 1024 (personalisation); larger means more SFT. Unrelated to the other variant's beta. The exponent
    is read from the paper's text layout (mapo.md 2b), and errors are means: the paper doesn't say.
    """

    beta: float = 8.0
    pairs: Pairs = BestWorst()
    title = "MaPO (AAAI variant)"
    reference_free = True
    min_k = 2
    needs_scores = False
    reads_weighting = False

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")

    def __call__(self, est: Estimate, batch: Batch, memory: Memory) -> Loss:
        b, w, l = self.pairs(batch)
        e_w, e_l = est.error[b, w], est.error[b, l]
        rows = expected(lambda w, l: w - F.logsigmoid(self._logit(w, l)) / self.beta, e_w, e_l,
                         None if batch.soft is None else batch.soft[b])
        return Loss.from_rows(rows, b, batch, logit=self._logit(e_w, e_l), winner_error=e_w)

    def _logit(self, e_w: Tensor, e_l: Tensor) -> Tensor:
        return odds(e_w) ** self.beta - odds(e_l) ** self.beta
