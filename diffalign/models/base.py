"""What a denoiser is to the rest of the house, and what its families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..process import Parameterization, Process
from ..types import Cond


class Denoiser(Protocol):
    """A stateless forward over a diffusers module.

    __call__: xt [N, *S] float32, t [N] float32 in (0, 1], cond of N rows -> raw [N, *S] in the native space of ``param``
    (a language model: xt [N, L] int64 -> logits [M, V] of its M mask tokens, row by row; it has no ``param``).
    Timesteps and time ids reach the module's sinusoidal embeddings in float32, whatever the autocast dtype.
    module: the diffusers model (replaceable: accelerate may wrap it). family: "sd", "sdxl", "sd3" or "llada".
    lora_targets: the family's attention projections, as peft matches them. component: its folder in a pipeline.
    identity: hash of its files, "unsaved" for a model made in memory.
    """

    module: nn.Module
    family: str
    component: str
    param: Parameterization
    process: Process
    lora_targets: tuple[str, ...]
    identity: str

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor: ...

    def idle(self) -> tuple[str, ...]: ...

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The same forward through another copy of the module."""
        ...


@dataclass(kw_only=True)
class Adapter:
    """Fields of every family. A family is one final subclass in one file, listed in ``load.FAMILIES``.

    It sets the class attributes below and writes five short functions (and ``idle``, where a layer has no effect):
    ``run(module, xt, t, cond)``, the forward; ``assemble(module, scheduler_config, identity)``, the constructor;
    ``unsupported(config, scheduler_config) -> str | None``, why a checkpoint cannot be used, read from two JSON files;
    ``encode(pipe, prompts) -> (tokens, pooled)`` and ``unconditional(pipe)``, by the stock pipeline's ``encode_prompt``.
    """

    family: ClassVar[str]                   # short name
    pipeline: ClassVar[str]                 # diffusers pipeline class
    component: ClassVar[str]                # the denoiser's name in that pipeline
    module_class: ClassVar[str]             # the denoiser's diffusers class
    library: ClassVar[str] = "diffusers"    # what model_index.json calls the place of that class
    texts: ClassVar[tuple[str, ...]]        # text encoders and tokenizers that the pipeline cannot do without
    lora_targets: ClassVar[tuple[str, ...]]
    pooled_is_projected: ClassVar[bool]     # whether the pooled prompt has gone through the encoder's CLIP projection
    hollow: ClassVar[bool] = False          # whether the pipeline cannot be built without a denoiser, be it an empty one
    audio: ClassVar[bool] = False           # whether latents are of sound: a ``SoundAdapter``
    kohya_prefix: ClassVar[str]             # goes before LoRA keys into convert_state_dict_to_kohya: "unet" for lora_unet_
    kohya_metadata: ClassVar[dict[str, str]]

    module: nn.Module
    process: Process
    param: Parameterization
    identity: str = "unsaved"
    dtype: torch.dtype = field(init=False)  # of the base weights: a LoRA added later is float32

    def __post_init__(self):
        self.dtype = next(self.module.parameters()).dtype

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.run(self.module, xt, t, cond)

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def idle(self) -> tuple[str, ...]:
        """Layers whose output the model drops: training them would move nothing, so they are left alone."""
        return ()

    def recompute(self) -> Callable | None:
        """What the model calls for (layer, *arguments) under gradient checkpointing; None for diffusers' own."""
        return None


def unwrap(module: nn.Module) -> Any:
    """The diffusers model inside a DistributedDataParallel or torch.compile wrapper."""
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def compile_blocks(denoiser: Denoiser, attempt: Callable[[], object], **options) -> str | None:
    """Compile the blocks that diffusers calls repeated, where they stand: names and state stay what they were.

    attempt: a pass like those of the run, which makes the compiler work. Returns why the blocks run as before, or None.
    Whatever fails to compile later runs uncompiled as well. options: of ``torch.compile``.
    """
    module = unwrap(denoiser.module)
    try:
        module.compile_repeated_blocks(**options)
        attempt()
    except Exception as error:  # compilers fail in many ways, and none of them is a reason to stop
        for layer in module.modules():
            layer._compiled_call_impl = None
        return " ".join(str(error).split("\n")[:2]).strip()[:200] or type(error).__name__  # dynamo's first line only says who
    torch._dynamo.config.suppress_errors = True
    return None


def enable_gradient_checkpointing(denoiser: Denoiser) -> None:
    """Recompute activations in the backward pass (non-reentrant; diffusers does it whenever gradients are enabled).

    The adapters must be on when backward runs: ``WeightBank.predict`` restores them after every reference pass.
    """
    recompute = denoiser.recompute() if isinstance(denoiser, Adapter) else None
    unwrap(denoiser.module).enable_gradient_checkpointing(*filter(None, (recompute,)))
