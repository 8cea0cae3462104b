"""What a recipe says about the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LATENT_REWARD = "latent_reward"  # folder of a latent reward model in its run's output_dir
LANGUAGE_MODEL = "model"  # folder of a fully fine-tuned language model in its run's output_dir
PEFT = "adapter_model.safetensors"  # a LoRA in peft's own layout
LARGEST_RANK = 2**14  # above the width of every layer known: more adds nothing


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on the denoiser, trained in float32.

    rank, alpha: alpha defaults to rank. target_modules: names as peft matches them; null takes the family's attention
    projections. init: peft's ``init_lora_weights``.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    init: Literal["gaussian", "default"] = "gaussian"

    def __post_init__(self):
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank must be at least 1 and at most {LARGEST_RANK}, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules names no layer; null takes the family's attention projections")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A diffusers pipeline, from a folder or a hub id; safetensors only, no remote code.

    lora: null trains all weights of the denoiser (the reference is then a frozen copy). revision: pin a hub id to a commit.
    fuse_lora: a LoRA of the denoiser (safetensors file, or folder with pytorch_lora_weights.safetensors) that belongs to the
    base, such as a few-step one: fused at load, before anything is trained, sampled or compared.
    distilled: whether the base was distilled to a few timesteps; null finds out from its files (``load.is_distilled``).
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    pretrained_vae_model_name_or_path: str | None = None
    lora: LoRA | None = LoRA()
    fuse_lora: str | None = None
    distilled: bool | None = None

    def __post_init__(self):
        if not self.pretrained_model_name_or_path.strip():
            raise ValueError("pretrained_model_name_or_path is empty; give a pipeline folder or a hub id")
        if self.fuse_lora is not None and not self.fuse_lora.strip():
            raise ValueError("fuse_lora is empty; give a LoRA file or folder, or null")
