"""A LoRA that belongs to the base: ``model.fuse_lora``, merged into the denoiser at load.

Few-step versions of a model (LCM, Lightning, Hyper, ...) are often published as a LoRA. Fused, they are part of what is
trained on and compared with: a LoRA trained on top is a change of the few-step model, not of the slow one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ModelError, first_line
from .folder import check_weights
from .lora import STEM, adapter_layers

if TYPE_CHECKING:
    from .base import Adapter

_TEXT = re.compile(r"text_encoder|lora_te")
_LAYER = re.compile(r"(?:unet|transformer)\.(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight")


def lora_file(name: str, option: str = "model.fuse_lora") -> Path:
    """The safetensors file that the option names, by itself or by its folder. Raises ModelError."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        path = os.path.join(path, f"{STEM}.safetensors")
    if not os.path.isfile(path):
        raise ModelError(f"{option}: {path}: no such file; give a LoRA in safetensors, or a folder that holds "
                         f"{STEM}.safetensors")
    if not path.endswith(".safetensors"):
        raise ModelError(f"{option}: {path}: only .safetensors files are read")
    return Path(path)


def check(file: Path, weights: Iterable[Path]) -> None:
    """Refuse, from headers alone, what is no LoRA for this denoiser. weights: the denoiser's own files. Raises ModelError.

    Layers are compared where the file calls them as diffusers does; kohya's names are left to diffusers, which converts them.
    """
    check_weights([file], "model.fuse_lora")
    shapes = _shapes([file])
    if not any("lora" in name for name in shapes):
        raise ModelError(f"model.fuse_lora: {file}: holds no LoRA" + (f" (first: {min(shapes)})" if shapes else ""))
    text = next((name for name in sorted(shapes) if _TEXT.match(name)), None)
    if text:  # the cached embeddings would not be those of the fused encoder
        raise ModelError(f"model.fuse_lora: {file}: changes a text encoder ({text}); only a LoRA of the denoiser is fused")
    base = _shapes(weights)
    for name, shape in sorted(shapes.items()):
        if (found := _LAYER.fullmatch(name)) and not _fits(base.get(f"{found[1]}.weight"), shape, found[2]):
            own = base.get(f"{found[1]}.weight")
            reason = "there is no such layer" if own is None else f"{shape} on a layer of {own}"
            raise ModelError(f"model.fuse_lora: {file}: is not for this model ({name}: {reason})")


def fuse(adapter: type[Adapter], module: nn.Module, file: Path) -> None:
    """Merge the LoRA into the module's weights, in their own precision, and take its layers off again.

    The same as ``pipe.load_lora_weights(file); pipe.fuse_lora(); pipe.unload_lora_weights()``, without a pipeline.
    Raises ModelError.
    """
    import diffusers

    pipeline = getattr(diffusers, adapter.pipeline)
    config = {"unet_config": module.config} if adapter.component == "unet" else {}  # to rename the blocks of kohya's files
    try:
        state, *alphas, metadata = pipeline.lora_state_dict(
            str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True, return_lora_metadata=True,
            **config)
        module.load_lora_adapter(state, prefix=adapter.component, adapter_name="fused", metadata=metadata,
                                 network_alphas=alphas[0] if alphas else None)
        if not adapter_layers(module):
            raise ValueError("holds nothing for this model")
        module.fuse_lora(safe_fusing=True)  # raises on NaN
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"model.fuse_lora: {file}: cannot be fused into this model ({first_line(error)})") from error
    module.unload_lora()
    module.requires_grad_(True)  # as it was loaded: peft freezes the base


def _shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes = {}
    for file in files:
        with safe_open(file, framework="np") as handle:
            shapes.update({name: handle.get_slice(name).get_shape() for name in handle.keys()})
    return shapes


def _fits(own: list[int] | None, shape: list[int], side: str) -> bool:
    """Down matrices take what the layer [out, in, ...] takes, up matrices give what it gives."""
    if own is None or len(shape) < 2:
        return False
    return shape[1:] == own[1:] if side in ("lora_A", "lora.down") else shape[0] == own[0]
