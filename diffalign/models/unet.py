"""Adapters for diffusers' UNet2DConditionModel: SD 1.x/2.x and SDXL, predicting noise, v or the clean latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before diffusers)
from ..process import X0, Eps, Parameterization, V, VariancePreserving
from ..types import Cond
from .base import Adapter

PARAMETERIZATIONS: dict[str, Parameterization] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SMALLEST_ALPHA = 2.0**-24   # zero terminal SNR: keeps log_snr finite, the same floor as diffusers' Euler scheduler


def schedule(scheduler_config: dict[str, Any]) -> VariancePreserving:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clamp(min=SMALLEST_ALPHA)
    return VariancePreserving.from_scheduler(scheduler)


def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
    """Why this UNet or noise schedule is not what the adapters assume, or None."""
    scheduler, prediction = str(scheduler_config.get("_class_name", "")), scheduler_config.get("prediction_type", "epsilon")
    if scheduler.startswith("EDM") or "FlowMatch" in scheduler:
        return f"its scheduler {scheduler} is not a variance-preserving DDPM schedule"
    steps = scheduler_config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or steps < 1:
        return f"num_train_timesteps of its scheduler is {steps!r}, not a whole number above 0"
    if not isinstance(prediction, str) or prediction not in PARAMETERIZATIONS:
        return f"prediction_type '{prediction}' is not one of {', '.join(PARAMETERIZATIONS)}"
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        return f"its UNet takes {config['in_channels']} channels and returns {config['out_channels']} (an inpainting model?)"
    for key in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
        if config.get(key) is not None:
            return f"its UNet uses {key}={config[key]!r}, which no adapter feeds"
    return None


@dataclass(kw_only=True)
class SD(Adapter):
    """Stable Diffusion 1.x and 2.x. Cond: tokens [N, L, D], pooled [N, D]: the state at the end of the prompt, which the
    denoiser does not read; latent reward models do."""

    family, pipeline, component, module_class = "sd", "StableDiffusionPipeline", "unet", "UNet2DConditionModel"
    texts = ("text_encoder", "tokenizer")
    pooled_is_projected = False
    lora_targets, kohya_prefix = ATTENTION, "unet"
    kohya_metadata = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return module(xt.to(self.dtype), self.process.timestep(t), cond.tokens.to(self.dtype), return_dict=False)[0]

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> SD:
        param = PARAMETERIZATIONS[scheduler_config.get("prediction_type", "epsilon")]
        return cls(module=module, process=schedule(scheduler_config), param=param, identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        if config.get("addition_embed_type") is not None:
            return f"its UNet uses addition_embed_type={config['addition_embed_type']!r}, which no adapter feeds"
        return unsupported(config, scheduler_config)

    @staticmethod
    def encode(pipe, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)[0], _pooled(pipe, prompts)

    @staticmethod
    def unconditional(pipe) -> tuple[Tensor, Tensor]:
        return pipe.encode_prompt([""], pipe.text_encoder.device, 1, True)[1], _pooled(pipe, [""])


def _pooled(pipe, prompts: list[str]) -> Tensor:
    """[N, D]: the text encoder's last state at the end of each prompt, which the stock pipeline does not give."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
                         return_tensors="pt").input_ids
    return pipe.text_encoder(ids.to(pipe.text_encoder.device)).pooler_output


@dataclass(kw_only=True)
class SDXL(Adapter):
    """Stable Diffusion XL base. Cond: tokens [N, L, D1+D2], pooled [N, D2], extra time_ids [N, 6] float32 in pixels.

    time_ids: original height and width, crop top and left, target height and width (``_get_add_time_ids``).
    """

    family, pipeline, component, module_class = "sdxl", "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel"
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pooled_is_projected = True
    lora_targets, kohya_prefix = ATTENTION, "unet"
    kohya_metadata = {"ss_base_model_version": "sdxl_base_v1-0",
                      "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # time ids stay float32: the UNet turns them into sines before it casts, and bf16 would make 1023 a 1024
        added = {"text_embeds": cond.pooled.to(self.dtype), "time_ids": cond.extra["time_ids"].float()}
        return module(xt.to(self.dtype), self.process.timestep(t), cond.tokens.to(self.dtype),
                      added_cond_kwargs=added, return_dict=False)[0]

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> SDXL:
        param = PARAMETERIZATIONS[scheduler_config.get("prediction_type", "epsilon")]
        return cls(module=module, process=schedule(scheduler_config), param=param, identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        if config.get("addition_embed_type") != "text_time":
            return f"its UNet has addition_embed_type={config.get('addition_embed_type')!r} instead of 'text_time'"
        return unsupported(config, scheduler_config)

    @staticmethod
    def encode(pipe, prompts: list[str]) -> tuple[Tensor, Tensor]:
        device = pipe.text_encoder_2.device
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return tokens, pooled

    @staticmethod
    def unconditional(pipe) -> tuple[Tensor, Tensor]:
        _, tokens, _, pooled = pipe.encode_prompt([""], device=pipe.text_encoder_2.device)
        return tokens, pooled
