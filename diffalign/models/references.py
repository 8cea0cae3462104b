"""What the reference is, and when it moves. Rules only: ``WeightBank`` holds the tensors and obeys.

names: weight sets that an objective's reference stands for, with their shares. moves: whether ``origin`` is another set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Frozen:
    """The model that training starts from, throughout."""

    moves = False
    needs_origin = False

    @property
    def names(self) -> Mapping[str, float]:
        return {"reference": 1.0}


@dataclass(frozen=True, kw_only=True)
class Moving:
    """Every ``every`` optimizer steps: reference <- mix * policy + (1 - mix) * reference.

    mix 1 with a gate is the stable reference update of "Rethinking DPO in Diffusion Models" (arXiv 2505.18736); mix 0.6,
    every 512 without a gate TR-DPO (arXiv 2404.09656); a small mix with every 1 a moving average. gate: the largest
    divergence from the base, in mean-reduced errors on a fixed set of winners (published: 0.005 SD 1.5, 0.002 SDXL); null has
    none. judge: whose divergence is tested, the policy's that is about to be copied (the reference then never crosses the
    gate) or the current reference's (the paper's words; it may cross once). thaw: a gate that closed may open again.
    origin_share: share of the base in a reference of two models, their geometric mean (multi-reference).
    At a copy every margin becomes 0 and the loss ln 2: that is no fault. What is mixed are the trained tensors: with a LoRA
    its two factors each, which for 0 < mix < 1 is not quite the mean of the weights they stand for.
    """

    every: int = 32
    mix: float = 1.0
    gate: float | None = None
    judge: Literal["candidate", "current"] = "candidate"
    thaw: bool = False
    origin_share: float = 0.0
    moves = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 < self.mix <= 1:
            raise ValueError(f"mix must be above 0 and at most 1, got {self.mix}")
        if not 0 <= self.origin_share < 1:
            raise ValueError(f"origin_share must be at least 0 and below 1, got {self.origin_share}")
        if self.gate is None and (self.thaw or self.judge != "candidate"):
            raise ValueError(f"{'thaw' if self.thaw else 'judge'} is about a gate, and there is none; set gate")

    @property
    def needs_origin(self) -> bool:
        return self.gate is not None or self.origin_share > 0

    @property
    def names(self) -> Mapping[str, float]:
        if not self.origin_share:
            return {"reference": 1.0}
        return {"reference": 1 - self.origin_share, "origin": self.origin_share}


@dataclass(frozen=True, kw_only=True)
class Past:
    """A checkpoint of the policy is kept every ``every`` steps, and one of them is the reference until the next: SePPO
    (arXiv 2410.05255). pick: "uniform" over all kept (the paper's), the "latest", or the "first", which is the base.

    keep: how many (the paper's 7 include the base); when there are more, the oldest after the base goes.
    """

    every: int = 30
    keep: int = 7
    pick: Literal["uniform", "latest", "first"] = "uniform"
    moves = True
    needs_origin = False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 2 <= self.keep <= 64:
            raise ValueError(f"keep must be at least 2 and at most 64, got {self.keep}")

    @property
    def names(self) -> Mapping[str, float]:
        return {"reference": 1.0}


Reference = Frozen | Moving | Past
REFERENCES = {"frozen": Frozen, "moving": Moving, "past": Past}
