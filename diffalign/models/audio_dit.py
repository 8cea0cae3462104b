"""Adapter for Stable Audio: a diffusion transformer over the latents of a waveform autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..process import Trigonometric, V
from ..types import Cond
from .base import Adapter, unwrap
from .lora import write_peft


@dataclass(kw_only=True)
class StableAudio(Adapter):
    """Stable Audio Open (StableAudioDiTModel), v-prediction with x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise.

    xt: [N, C, L]. cond: tokens [N, T, D], the projected text; extra ``durations`` [N, 2, D], the embeddings of the seconds at
    which the clip starts and ends, its own in each candidate. The pipeline joins text and seconds for the cross-attention, and
    the two seconds for what is put in front of the latents. Its null condition is zeros in the cross-attention alone.
    """

    family, pipeline, component = "stable_audio", "StableAudioPipeline", "transformer"
    module_class = "StableAudioDiTModel"
    texts = ("text_encoder", "tokenizer", "projection_model")
    pooled_is_projected = False
    hollow = audio = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_prefix, kohya_metadata = "", {}  # no reader of that layout knows this model

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        durations = cond.extra["durations"].to(self.dtype)
        start_end = durations.flatten(1)[:, None]  # [N, 1, 2 D]
        return module(xt.to(self.dtype), self.process.timestep(t), global_hidden_states=start_end, return_dict=False,
                      encoder_hidden_states=torch.cat([cond.tokens.to(self.dtype), durations], 1),
                      rotary_embedding=self.rotary(xt.shape[2] + 1, xt.device))[0]

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """length: latent frames and the one in front of them. -> (cos, sin), [length, half a head] each."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        size = unwrap(self.module).config.attention_head_dim // 2
        cos, sin = get_1d_rotary_pos_embed(size, length, use_real=True, repeat_interleave_real=False)
        return cos.to(device), sin.to(device)

    def idle(self) -> tuple[str, ...]:
        """The frequencies of the time embedding, which are constants."""
        return ("time_proj",)

    def save_lora(self, folder: Path | str, metadata: dict[str, str]) -> None:
        """As ``PeftModel.from_pretrained(pipe.transformer, folder)`` reads it: the pipeline has no loader of LoRA files."""
        write_peft(self, folder, metadata)

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> StableAudio:
        return cls(module=module, process=Trigonometric(), param=V(), identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        kind = scheduler_config.get("prediction_type", "v_prediction")
        if scheduler_config.get("_class_name") != "CosineDPMSolverMultistepScheduler" or kind != "v_prediction":
            return f"its scheduler is {scheduler_config.get('_class_name')} ({kind}); supported is the cosine v-prediction one"
        return None

    @staticmethod
    def encode(pipe, prompts: list[str]) -> tuple[Tensor, None]:
        return pipe.encode_prompt(prompts, pipe.text_encoder.device, False), None

    @staticmethod
    def unconditional(pipe) -> tuple[Tensor, None]:
        return torch.zeros_like(StableAudio.encode(pipe, [""])[0]), None
