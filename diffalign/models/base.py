"""What a denoiser is to the rest of the house, and what its families share."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..errors import ConfigError
from ..process import Parameterization, Process
from ..types import Cond


class Denoiser(Protocol):
    """A stateless forward over a diffusers module.

    __call__: xt [N, *S] float32, t [N] float32 in (0, 1], cond of N rows -> raw [N, *S] in the native space of ``param``
    (a language model: xt [N, L] int64 -> logits [M, V] of its M mask tokens, row by row; it has no ``param``).
    Timesteps and time ids reach the module's sinusoidal embeddings in float32, whatever the autocast dtype.
    module: the diffusers model (replaceable: accelerate may wrap it). family: a name of ``load.FAMILIES``, or a model type.
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
    library: ClassVar[str] = "diffusers"    # what model_index.json may also call the place of that class
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
        """Calls a layer, (layer, *arguments), as it should be under gradient checkpointing; None where diffusers does."""
        return None


def unwrap(module: nn.Module) -> Any:
    """The diffusers model inside a DistributedDataParallel or torch.compile wrapper."""
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def compile_blocks(denoiser: Denoiser, attempt: Callable[[], object], *, race: int = 0, **options) -> str | None:
    """Compile the blocks that diffusers calls repeated, where they stand: names and state stay what they were.

    attempt: a pass like those of the run, to its end, which makes the compiler work. race: so many passes of each kind decide
    whether the compiled blocks stay. Returns why the blocks run as before, or None. Whatever fails to compile later runs
    uncompiled as well. options: of ``torch.compile``.
    """
    module = unwrap(denoiser.module)
    try:
        module.compile_repeated_blocks(**options)
        attempt()
    except Exception as error:  # compilers fail in many ways, and none of them is a reason to stop
        uncompile(denoiser)
        return " ".join(str(error).split("\n")[:2]).strip()[:200] or type(error).__name__  # dynamo's first line only says who
    torch._dynamo.config.suppress_errors = True
    if race:
        plain, compiled = _race(module, attempt, race)
        if compiled >= plain:
            uncompile(denoiser)
            return f"{compiled:.3g} s a pass compiled, {plain:.3g} s as they are"
    return None


def uncompile(denoiser: Denoiser) -> None:
    """Let the blocks run as they are again."""
    _call(unwrap(denoiser.module), {})


def _call(module: nn.Module, compiled: dict[nn.Module, object]) -> None:
    """Let these layers run compiled, and no others."""
    for layer in module.modules():
        layer._compiled_call_impl = compiled.get(layer)


def _race(module: nn.Module, attempt: Callable[[], object], passes: int) -> tuple[float, float]:
    """Median seconds of a pass as the blocks are and of one compiled, in turns."""
    compiled = {layer: layer._compiled_call_impl for layer in module.modules() if layer._compiled_call_impl is not None}
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(passes):
        for times, calls in zip(seconds, ({}, compiled), strict=True):
            _call(module, calls)
            start = time.perf_counter()
            attempt()
            times.append(time.perf_counter() - start)
    plain, fast = (statistics.median(times) for times in seconds)
    return plain, fast


class _InItsInputsType:
    """A norm in the type of its input, whatever autocast thinks; its kernel adds up in float32 all the same.

    On CUDA autocast computes norms in float32, and what follows until the next matrix product: of an SDXL pair at 1024x1024
    that would be kept for the backward, 3 GiB more (``tests/models/test_counts.py``).
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self.norm(x, weight, bias)


class _GroupNorm(_InItsInputsType, nn.GroupNorm):
    def norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class _LayerNorm(_InItsInputsType, nn.LayerNorm):
    def norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


_NORMS = {nn.GroupNorm: _GroupNorm, nn.LayerNorm: _LayerNorm}


def narrow_norms(denoiser: Denoiser) -> None:
    """Let group and layer norms compute in the type that reaches them, as stock pipelines in half precision do. Names and
    weights stay. For bfloat16: float16's range is not made for the sums in front of a norm.
    """
    for layer in unwrap(denoiser.module).modules():
        if type(layer) in _NORMS:
            layer.__class__ = _NORMS[type(layer)]


_ATTENTIONS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
               "fused_attention_overrideable")
_DEAR = {torch.ops.aten.convolution.default,
         *(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _ATTENTIONS)}


def _keep_dear(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Attention and convolutions: much arithmetic for the bytes of their results."""
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def enable_gradient_checkpointing(denoiser: Denoiser, selective: bool = False) -> None:
    """Recompute activations in the backward pass (non-reentrant; diffusers does it whenever gradients are enabled).

    selective: what attention and convolutions give is kept. The adapters must be on when backward runs:
    ``WeightBank.predict`` restores them after every reference pass. Raises ConfigError for a model that takes no function.
    """
    module, call = unwrap(denoiser.module), denoiser.recompute() if isinstance(denoiser, Adapter) else None
    if not selective and call is None:
        module.enable_gradient_checkpointing()
        return
    if "gradient_checkpointing_func" not in inspect.signature(module.enable_gradient_checkpointing).parameters:
        raise ConfigError(f"train.gradient_checkpointing: {type(module).__name__} knows true and false only, not 'selective'")
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_dear)} if selective else {}

    def recomputed(layer: nn.Module, *args):
        return checkpoint(layer if call is None else partial(call, layer), *args, use_reentrant=False, **kept)

    module.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)
