"""What a denoiser is to the rest of the house."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..process import Parameterization, Process
from ..types import Cond


class Denoiser(Protocol):
    """A stateless forward over a diffusers module.

    __call__: xt [N, *S] float32, t [N] float32 in (0, 1], cond of N rows -> raw [N, *S] in the native space of ``param``.
    Timesteps and time ids reach the module's sinusoidal embeddings in float32, whatever the autocast dtype.
    module: the diffusers model (replaceable: accelerate may wrap it). family: "sd", "sdxl" or "sd3".
    lora_targets: the family's attention projections, as peft matches them.
    """

    module: nn.Module
    family: str
    param: Parameterization
    process: Process
    lora_targets: tuple[str, ...]

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor: ...
