"""LoRA on a denoiser: attach, switch off, save in the two layouts that people load."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before diffusers)
from ..errors import ConfigError, ModelError, first_line
from .base import Denoiser, unwrap
from .folder import check_weights
from .spec import PEFT, LoRA

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "policy"
STEM = "pytorch_lora_weights"


def attach(denoiser: Denoiser, lora: LoRA, *, seed: int) -> None:
    """Freeze the base and add the trainable adapter "policy", in float32 whatever the base's dtype.

    seed: of the initialisation; the global random state is left alone. The up matrices start at zero, so the policy starts
    as the reference. Raises ConfigError when ``target_modules`` matches nothing.
    """
    from peft import LoraConfig

    module = unwrap(denoiser.module)
    module.requires_grad_(False)
    targets = list(lora.target_modules or denoiser.lora_targets)
    _check_targets(denoiser, targets if lora.target_modules else [])
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank if lora.alpha is None else lora.alpha, target_modules=targets,
                        exclude_modules=list(denoiser.idle()) or None, lora_dropout=0.0,
                        init_lora_weights=True if lora.init == "default" else lora.init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            _add(module, config)
        except ValueError as error:
            raise ConfigError(f"model.lora.target_modules: {targets} cannot all carry a LoRA ({first_line(error)}); "
                              f"the family's default is {list(denoiser.lora_targets)}") from error
    for parameter in trained(module).values():
        parameter.data = parameter.data.float()
    for layer in adapter_layers(module):  # peft would cast inputs to float32 and autocast back: copies for every layer
        layer.cast_input_dtype_enabled = False


def _add(module: nn.Module, config) -> None:
    if hasattr(module, "add_adapter"):
        return module.add_adapter(config, adapter_name=ADAPTER)
    from peft import inject_adapter_in_model  # some diffusers models lack the method (StableAudioDiTModel)

    inject_adapter_in_model(config, module, ADAPTER)
    module.peft_config = {ADAPTER: config}
    return None


def _check_targets(denoiser: Denoiser, targets: list[str]) -> None:
    """peft refuses a list of which nothing matches; a single misspelt name among good ones it would pass over."""
    names = [f".{name}" for name, _ in unwrap(denoiser.module).named_modules()]
    lost = [target for target in targets if not target or not any(name.endswith(f".{target}") for name in names)]
    if lost:
        raise ConfigError(f"model.lora.target_modules: {lost} matches no layer of this {denoiser.component}; "
                          f"its family's default is {list(denoiser.lora_targets)}")


def load(pipe, file: Path, adapter: str = "default_0") -> None:
    """Put the LoRA of a safetensors file on a stock pipeline, under the name ``adapter``, beside those that are on it.

    Peft's own files (``adapter_model.safetensors``, of models whose pipeline loads no LoRA) are put on the denoiser.
    Raises ModelError, one line.
    """
    check_weights([file], "the trained LoRA")
    if file.name == PEFT:
        return load_peft(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, file, adapter)
    try:
        with warnings.catch_warnings(), _silent("diffusers.loaders.peft"):  # logs hundreds of lines before it raises
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several, on purpose
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Error(s) in")]
        reason = (lines or [type(error).__name__])[0][:200]
        raise ModelError(f"{file}: does not fit this model ({reason}); train it again, or name its own base") from error
    if not any(adapter in names for names in pipe.get_list_adapters().values()):
        raise ModelError(f"{file}: holds nothing for this model; train it again, or name its own base")
    return None


def load_peft(module: nn.Module, file: Path, adapter: str = ADAPTER) -> None:
    """Put the LoRA of ``write_peft`` on a denoiser, where it is active at once. Raises ModelError, one line."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    check_weights([file], "the trained LoRA")
    try:
        config = LoraConfig.from_pretrained(str(file.parent))
        inject_adapter_in_model(config, module, adapter)
        state = {name.removeprefix("base_model.model."): x for name, x in load_file(file).items()}
        unknown = set_peft_model_state_dict(module, state, adapter_name=adapter).unexpected_keys
        if unknown or not state:
            raise ValueError(f"no layer for {unknown[0]}" if unknown else "it is empty")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{file}: does not fit this model ({first_line(error)}); train it again, or name its own "
                         "base") from error
    module.peft_config = {**getattr(module, "peft_config", {}), adapter: config}


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, sorted."""
    return {name: p for name, p in sorted(module.named_parameters()) if f".{ADAPTER}." in name and ".lora_" in name}


def adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers that peft wrapped (560 in SDXL: worth finding once, not at every step)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """The base model alone. The adapters are on again afterwards, also after an exception, and so before any backward.

    The flag alone: peft's ``enable_adapters`` also walks through all requires_grad, which costs SDXL's 560 layers tens of
    milliseconds a step and means nothing to a pass without gradients.
    """
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_state(denoiser: Denoiser) -> dict[str, Tensor]:
    """peft's own keys without the adapter's name ("...to_q.lora_A.weight") -> float32 tensors on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(unwrap(denoiser.module), adapter_name=ADAPTER)
    return {name: state[name].detach().float().cpu().contiguous() for name in sorted(state)}


def save_lora(denoiser: Denoiser, folder: Path | str, metadata: dict[str, str], *, stem: str = STEM) -> list[Path]:
    """Two files with the same weights, both float32 and both with ``metadata`` (rank and alpha are added to it).

    ``pytorch_lora_weights.safetensors``: what ``pipe.load_lora_weights(folder)`` of stock diffusers reads. alpha/rank is
    multiplied into the up matrices and the file says alpha = rank, so that readers that know no alpha are right, too.

    ``<stem>_comfy.safetensors``: kohya's layout with an alpha per layer. SD and SDXL: ``lora_unet_<diffusers name>``, read
    by stock diffusers (tested) and, from reading their sources, by ComfyUI and A1111. SD3: ``lora_transformer_<name>``,
    in ComfyUI's key map for SD3 (comfy/lora.py, read, not run); diffusers does not read it and A1111 was not looked at.
    Families without a ``kohya_prefix`` get the first file alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank, alpha = rank_and_alpha(denoiser)
    files = [folder / f"{STEM}.safetensors", folder / f"{stem}_comfy.safetensors"]
    state = lora_state(denoiser)
    said = {**metadata, "format": "pt", "rank": str(rank)}
    write_tensors(files[0], _diffusers_layout(denoiser, state, alpha / rank),
           said | {"alpha": str(rank), "trained_alpha": f"{alpha:g}"})
    if not denoiser.kohya_prefix:
        return files[:1]
    write_tensors(files[1], kohya_layout(denoiser, state, alpha),
           _kohya_metadata(denoiser, rank, alpha) | said | {"alpha": f"{alpha:g}"})
    return files


def rank_and_alpha(denoiser: Denoiser) -> tuple[int, float]:
    config = unwrap(denoiser.module).peft_config[ADAPTER]
    return config.r, float(config.lora_alpha)


def write_peft(denoiser: Denoiser, folder: Path | str, metadata: dict[str, str],
               named: Callable[[str], str] = str) -> None:
    """adapter_model.safetensors and adapter_config.json, as ``PeftModel.from_pretrained(model, folder)`` reads them, ``rank``
    and ``alpha`` as trained. named: a weight's name in that model.
    """
    folder, (rank, alpha) = Path(folder), rank_and_alpha(denoiser)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{named(name)}": x for name, x in lora_state(denoiser).items()}
    layers = [name.split(".lora_")[0].rsplit(".", 2)[1:] for name in state]
    targets = sorted({".".join(path) if path[-1].isdigit() else path[-1] for path in layers})  # "to_out.0", not "0"
    config = {"peft_type": "LORA", "task_type": None, "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
              "target_modules": targets, "base_model_name_or_path": None, "inference_mode": True}
    write_tensors(folder / PEFT, state, {**metadata, "format": "pt", "rank": str(rank)})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def kohya_layout(denoiser: Denoiser, state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """peft keys -> ``<prefix>_<layer with underscores>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""
    from diffusers.utils import convert_state_dict_to_kohya

    kohya = convert_state_dict_to_kohya({f"{denoiser.kohya_prefix}.{name}": x for name, x in state.items()})
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else x for name, x in kohya.items()}


def _diffusers_layout(denoiser: Denoiser, state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {f"{denoiser.component}.{name}": x * scale if ".lora_B." in name else x for name, x in state.items()}


def _kohya_metadata(denoiser: Denoiser, rank: int, alpha: float) -> dict[str, str]:
    """What the web UIs show, and what A1111 tells SD 1, 2 and XL apart by."""
    family = dict(denoiser.kohya_metadata)
    if denoiser.family == "sd" and unwrap(denoiser.module).config.cross_attention_dim == 1024:
        family = {"ss_base_model_version": "sd_v2", "ss_v2": "True", "modelspec.architecture": "stable-diffusion-v2/lora"}
    return family | {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}",
                     "modelspec.sai_model_spec": "1.0.0"}


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written aside, then renamed."""
    from safetensors.torch import save_file

    aside = file.with_name(f".{file.name}.partial")
    save_file(tensors, aside, metadata=metadata)
    aside.chmod(0o644)  # safetensors writes files that only their owner can read
    aside.replace(file)
