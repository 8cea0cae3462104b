"""What the loop runs: a method, and the context that is all it may touch besides its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..process import Parameterization, Process
from ..types import Batch, Cond, Loss, Memory


@dataclass(frozen=True, kw_only=True)
class Context:
    """predict(name, xt [N,*S], t [N], cond of N rows) -> raw [N,*S] under a named weight set; gradients only for "policy"."""

    predict: Callable[[str, Tensor, Tensor, Cond], Tensor]
    process: Process
    param: Parameterization
    seed: int
    step: int
    memory: Memory


class Method(Protocol):
    """reads: names of the weight sets it needs."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    def loss(self, batch: Batch, ctx: Context) -> Loss: ...
