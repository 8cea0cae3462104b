"""Loading a diffusers pipeline from a folder or a hub id: safetensors only, no remote code, refused before it is heavy."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import _compat  # noqa: F401  (before diffusers)
from ..errors import ModelError, first_line
from .ace_step import AceStep
from .audio_dit import StableAudio
from .audio_unet import AudioLDM2
from .base import Adapter, Denoiser, unwrap
from .dit import SD3
from .encoders import EncoderFacts, Encoders
from .folder import (
    IGNORED,
    TEXT,
    WEIGHTED,
    Folder,
    check_components,
    check_weights,
    content,
    digest,
    read_folder,
    read_json,
    weight_files,
)
from .fuse import check as check_fused
from .fuse import fuse, lora_file
from .spec import ModelSpec
from .unet import SD, SDXL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES: dict[str, type[Adapter]] = {"sd": SD, "sdxl": SDXL, "sd3": SD3, "stable_audio": StableAudio,
                                      "audioldm2": AudioLDM2, "ace_step": AceStep}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(spec: ModelSpec, *, parts: Literal["all", "encoders"] = "all") -> DiffusionPipeline:
    """The stock pipeline in float32, on the CPU, ``fuse_lora`` fused. parts: "encoders" leaves the denoiser out.

    Raises ModelError for everything that is wrong with the folder or hub id.
    """
    import diffusers

    quiet_bars()
    folder, adapter = inspect(spec)
    check_components(folder, folder.components if parts == "all" else _encoder_parts(folder))
    absent = {name: None for name in folder.index
              if name in IGNORED and name not in adapter.texts or name in TEXT and name not in folder.components}
    if adapter is SD:
        absent["requires_safety_checker"] = False
    if parts == "encoders":
        absent[adapter.component] = None
        if adapter.hollow:  # nor is there a need for a solver, which may want a library of its own
            absent |= {adapter.component: _hollow(folder, adapter), "scheduler": None}
    if spec.pretrained_vae_model_name_or_path:
        absent["vae"] = _load_vae(spec)
    with loading(folder.name):
        # without a dtype transformers 5 takes the checkpoint's, which may be half precision
        pipe = getattr(diffusers, adapter.pipeline).from_pretrained(
            folder.path, torch_dtype=torch.float32, use_safetensors=True, variant=spec.variant, local_files_only=True,
            **absent)
    if parts == "all" and spec.fuse_lora:
        fuse(adapter, getattr(pipe, adapter.component), lora_file(spec.fuse_lora))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet_bars() -> None:
    """diffusers shows no bar of what it loads where its verbosity is errors only, as the command line sets it."""
    from diffusers.utils import logging

    if logging.get_verbosity() >= logging.ERROR:
        logging.disable_progress_bar()


def _hollow(folder: Folder, adapter: type[Adapter]) -> torch.nn.Module:
    """The denoiser without its weights: a pipeline may ask it for its sizes."""
    import diffusers

    with loading(folder.name), torch.device("meta"):
        return getattr(diffusers, adapter.module_class).from_config(folder.config(adapter.component))


def load_encoders(spec: ModelSpec, device: str | torch.device = "cpu") -> Encoders:
    """VAE and text encoders, float32. Raises ModelError."""
    facts, (folder, adapter) = encoder_facts(spec), inspect(spec)
    pipe = load_pipeline(spec, parts="encoders")
    if not adapter.hollow:  # encode_prompt may ask the denoiser for its sizes, never for its weights
        config = SimpleNamespace(**folder.config(adapter.component))
        setattr(pipe, adapter.component, SimpleNamespace(config=config, dtype=torch.float32))
    return Encoders(pipe=pipe, adapter=adapter, **vars(facts)).to(device)


def encoder_facts(spec: ModelSpec) -> EncoderFacts:
    """Sizes and identity of the encoders from their files, without loading them. Raises ModelError."""
    folder, adapter = inspect(spec)
    check_components(folder, _encoder_parts(folder))
    vae = read_json(_vae_files(spec, folder)[0], folder.name)
    factor = math.prod(vae.get("downsampling_ratios") or [2] * (len(vae.get("block_out_channels") or [64]) - 1))
    size = folder.config(adapter.component).get("sample_size") or 64
    sides = size if isinstance(size, list) else [size]
    _check_positive(folder, f"{adapter.component}/config.json: sample_size", *sides)
    _check_positive(folder, "the VAE's config.json: scaling_factor", vae.get("scaling_factor", 1.0))
    return EncoderFacts(
        family=adapter.family, spatial_factor=factor,
        latent_channels=vae.get("latent_channels", vae.get("decoder_input_channels", 4)),
        default_resolution=factor * min(sides), scaling_factor=vae.get("scaling_factor", 1.0),
        shift_factor=vae.get("shift_factor"), identity=_encoder_identity(spec, folder))


def _check_positive(folder: Folder, what: str, *values: object) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ModelError(f"{folder.name}: {what} must be a number above 0, got {str(value)[:40]}")


def load_denoiser(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Denoiser:
    """The family's adapter around the denoiser, ``fuse_lora`` fused; neither VAE nor text encoders are read.

    Raises ModelError.
    """
    import diffusers

    quiet_bars()
    folder, adapter = inspect(spec)
    check_components(folder, (adapter.component,))
    with loading(folder.name):
        module, info = getattr(diffusers, adapter.module_class).from_pretrained(
            folder.path, subfolder=adapter.component, torch_dtype=torch.float32 if spec.fuse_lora else dtype,
            use_safetensors=True, variant=spec.variant, local_files_only=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ModelError(f"{folder.name}: {adapter.component}/ lacks {len(info['missing_keys'])} weights, first "
                         f"{sorted(info['missing_keys'])[0]}; the files do not belong to its config.json")
    if spec.fuse_lora:  # in float32, so that the sum is rounded once
        fuse(adapter, module, lora_file(spec.fuse_lora))
        torch.nn.Module.to(module, dtype)  # diffusers' own warns of layers to keep in float32, of which no family here has any
    with loading(folder.name):  # diffusers builds the noise schedule from whatever its file says
        return adapter.assemble(module.to(device).eval(), folder.config("scheduler"),
                                _denoiser_identity(spec, folder, adapter))


def model_identity(spec: ModelSpec) -> str:
    """Hex SHA-256 of the denoiser's configuration, weights, noise schedule and fused LoRA. Raises ModelError."""
    folder, adapter = inspect(spec)
    check_components(folder, (adapter.component,))
    return _denoiser_identity(spec, folder, adapter)


def is_distilled(spec: ModelSpec) -> bool:
    """Whether the base draws in a few steps, as far as its files tell: a fused LoRA, a few-step scheduler, SDXL-Turbo's
    (ancestral, ending on the noisiest step), a UNet that is told the guidance (LCM), ACE-Step's turbo. Raises ModelError."""
    if spec.distilled is not None:
        return spec.distilled
    folder, adapter = inspect(spec)
    scheduler = folder.components.get("scheduler", (None, None))[1]
    trailing = folder.config("scheduler").get("timestep_spacing") == "trailing"
    config = folder.config(adapter.component)
    return bool(spec.fuse_lora or scheduler in ("LCMScheduler", "TCDScheduler")
                or (scheduler == "EulerAncestralDiscreteScheduler" and trailing)
                or config.get("time_cond_proj_dim") or config.get("is_turbo") or config.get("model_version") == "turbo")


def save_pipeline(spec: ModelSpec, denoiser: Denoiser, folder: Path | str) -> Path:
    """A whole pipeline folder with the (fully fine-tuned) denoiser in place, float32. Written aside, then renamed.

    Raises ValueError if the denoiser carries a LoRA, ModelError if the base cannot be loaded, FileExistsError if ``folder``
    is there already.
    """
    module = unwrap(denoiser.module)
    if getattr(module, "peft_config", None):
        raise ValueError("this denoiser carries a LoRA: save that instead (models.save_lora)")
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    pipe = load_pipeline(replace(spec, fuse_lora=None), parts="encoders")  # the module holds it already
    pipe.register_modules(**{denoiser.component: module})
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        pipe.save_pretrained(aside, safe_serialization=True)
        if pipe.scheduler is None:
            _add_scheduler(aside, inspect(spec)[0])
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _add_scheduler(saved: Path, base: Folder) -> None:
    """The base's own, as files: it was not loaded."""
    shutil.copytree(base.path / "scheduler", saved / "scheduler")
    index = read_json(saved / "model_index.json", saved.name)
    index["scheduler"] = base.index["scheduler"]
    (saved / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def inspect(spec: ModelSpec) -> tuple[Folder, type[Adapter]]:
    """The folder and the family that reads it, from JSON files and safetensors headers alone. Raises ModelError."""
    folder = read_folder(_resolve(spec), spec.pretrained_model_name_or_path, spec.variant)
    adapter = next((a for a in FAMILIES.values() if a.pipeline == folder.pipeline), None)
    if adapter is None:
        known = ", ".join(a.pipeline for a in FAMILIES.values())
        raise ModelError(f"{folder.name}: pipeline {folder.pipeline} is not supported; supported are {known}")
    library, module_class = folder.components.get(adapter.component, (None, None))
    if library not in ("diffusers", adapter.library) or module_class != adapter.module_class:
        raise ModelError(f"{folder.name}: unsupported denoiser: {adapter.component} is {module_class or 'absent'}, "
                         f"{adapter.pipeline} needs {adapter.module_class}")
    lost = next((part for part in adapter.texts if part not in folder.components and part not in IGNORED), None)
    if lost is not None:
        raise ModelError(f"{folder.name}: model_index.json names no {lost}, which a {adapter.pipeline} needs")
    reason = adapter.unsupported(folder.config(adapter.component), folder.config("scheduler"))
    if reason:
        raise ModelError(f"{folder.name}: unsupported denoiser: {reason}")
    if spec.fuse_lora:
        file = lora_file(spec.fuse_lora)
        check_components(folder, (adapter.component,))
        check_fused(file, folder.weights(adapter.component))
    return folder, adapter


def _encoder_parts(folder: Folder) -> list[str]:
    return [part for part in folder.components if part == "vae" or part in TEXT]


def _denoiser_identity(spec: ModelSpec, folder: Folder, adapter: type[Adapter]) -> str:
    files = [folder.path / adapter.component / "config.json", folder.path / "scheduler" / "scheduler_config.json"]
    # a LoRA file may be renamed and moved at will: only its bytes count
    fused = [f"fuse_lora {content(lora_file(spec.fuse_lora))}"] if spec.fuse_lora else []
    return digest([*files, *folder.weights(adapter.component)], *fused)


def _encoder_identity(spec: ModelSpec, folder: Folder) -> dict[str, str]:
    """Weights of the chosen variant, and every small file (configurations, vocabularies) beside them."""
    def files(part: str) -> list[Path]:
        small = [f for f in (folder.path / part).iterdir() if f.suffix in (".json", ".txt", ".model")]
        return [*small, *(folder.weights(part) if part in WEIGHTED else [])]

    text = [file for part in TEXT if part in folder.components for file in files(part)]
    # whether "no prompt" means zeros is written in the pipeline's index
    zeros = f"force_zeros_for_empty_prompt={folder.index.get('force_zeros_for_empty_prompt')}"
    kept = ["pooled"] if folder.pipeline == SD.pipeline else []  # caches from before it was kept have none
    return {"vae": digest(_vae_files(spec, folder)), "text": digest(text, zeros, *kept)}


def _vae_files(spec: ModelSpec, folder: Folder) -> list[Path]:
    """config.json first, then the weights, of the VAE in use."""
    if spec.pretrained_vae_model_name_or_path:
        vae = _vae_folder(spec)
        return [vae / "config.json", *weight_files(vae, None, spec.pretrained_vae_model_name_or_path)]
    return [folder.path / "vae" / "config.json", *folder.weights("vae")]


def _load_vae(spec: ModelSpec) -> Any:
    from diffusers import AutoencoderKL

    name, folder = spec.pretrained_vae_model_name_or_path, _vae_folder(spec)
    check_weights(weight_files(folder, None, name), name)
    with loading(name):
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True)


def _vae_folder(spec: ModelSpec) -> Path:
    """The folder with the VAE's config.json: of its own, or vae/ inside a pipeline. Raises ModelError."""
    name = spec.pretrained_vae_model_name_or_path
    path = Path(name) if os.path.isdir(name) else download(name, None, ["*config.json", "*.safetensors", "vae/*"])
    path = path / "vae" if (path / "vae").is_dir() else path
    found = read_json(path / "config.json", name).get("_class_name")
    if found != "AutoencoderKL":
        raise ModelError(f"{name}: a {found} is not an AutoencoderKL (model.pretrained_vae_model_name_or_path)")
    return path


def _resolve(spec: ModelSpec) -> Path:
    """A local folder; a hub id is downloaded (or found in the cache) first. Raises ModelError."""
    name = spec.pretrained_model_name_or_path
    path = Path(os.path.expanduser(name))   # Path.expanduser raises on an unknown user
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        return path
    if os.path.isfile(path):
        raise ModelError(f"{name}: is a single file; diffalign reads pipeline folders. Convert it once: "
                         f"StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder (and not a hub id of the form owner/name)")
    # the index first: what it names decides whether the rest is worth a download
    parts = read_folder(download(name, spec.revision, ["model_index.json"]), name).components
    patterns = [f"{part}/*{end}" for part in parts for end in (".json", ".txt", ".model", *_weight_patterns(spec.variant))]
    return download(name, spec.revision, ["model_index.json", *patterns])


def folder_of(spec: ModelSpec, patterns: list[str]) -> Path:
    """A language model's folder; of a hub id the files of these patterns are downloaded, or found in the cache. Raises
    ModelError."""
    name = spec.pretrained_model_name_or_path
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder (and not a hub id of the form owner/name)")
    return download(name, spec.revision, patterns)


def _weight_patterns(variant: str | None) -> tuple[str, ...]:
    """Safetensors of one variant; for none, the plain names that diffusers and transformers write."""
    if variant:
        return (f".{variant}.safetensors", f".{variant}-*.safetensors")
    return ("model.safetensors", "model-*.safetensors")


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a hub repository -> its folder in the cache. Raises ModelError, one line, also when offline.

    Asked for once in a process: a command looks at its model some twenty times, and all parts should be of one commit.
    """
    return _downloaded(name, revision, tuple(patterns))


@lru_cache(maxsize=64)
def _downloaded(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """A hub that cannot be reached is asked once; its client by itself would ask for half a minute."""
    from huggingface_hub import snapshot_download

    problem = unreachable("model", name, revision)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns),
                                      local_files_only=problem is not None))
    except Exception as error:   # of whichever HTTP library the hub's client uses in this version
        at, problem = f" at revision {revision}" if revision else "", problem or first_line(error)
        raise ModelError(f"{name}: no such folder here, and the hub did not give it{at} ({problem}); check the path, the "
                         "network, or download it beforehand") from error


def unreachable(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str | None:
    """Why the hub gives no answer at all; None where it gives one, whatever it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        getattr(HfApi(), f"{kind}_info")(name, revision=revision, timeout=10)
    except HfHubHTTPError:
        return None
    except Exception as error:   # as above
        return first_line(error)
    return None


@contextmanager
def loading(name: object):
    """Whatever a library raises on a damaged model becomes one line."""
    try:
        with warnings.catch_warnings():
            # newer diffusers says dtype instead; the oldest that we support knows torch_dtype only
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be loaded ({first_line(error)})") from error
