"""Adapter for Stable Audio: a diffusion transformer over the latents of a waveform autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..process import Trigonometric, V
from ..types import Cond, carried
from .base import unwrap
from .sound import Arrays, Clips, SoundAdapter, array, counted

if TYPE_CHECKING:
    from .encoders import Encoders


@dataclass(kw_only=True)
class StableAudio(SoundAdapter):
    """Stable Audio Open (StableAudioDiTModel), v-prediction with x_t = cos(pi t / 2) x0 + sin(pi t / 2) noise.

    xt: [N, C, L]. cond: tokens [N, T, D], the projected text; extra ``durations`` [N, 2, D], the embeddings of the seconds at
    which the clip starts and ends, its own in each candidate. The pipeline joins text and seconds for the cross-attention, and
    the two seconds for what is put in front of the latents. Its null condition is zeros in the cross-attention alone.
    """

    family, pipeline, component = "stable_audio", "StableAudioPipeline", "transformer"
    module_class = "StableAudioDiTModel"
    texts = ("text_encoder", "tokenizer", "projection_model")
    hollow = True
    seconds = "audio_end_in_s"
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
        return carried(cos, device), carried(sin, device)

    def idle(self) -> tuple[str, ...]:
        """The frequencies of the time embedding, which are constants."""
        return ("time_proj",)

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

    @staticmethod
    def clips(pipe) -> Clips:
        """All latents are of one length: as the pipeline does, a shorter clip is a full one whose end is silent."""
        full = pipe.transformer.config.sample_size * pipe.vae.hop_length
        return Clips(rate=pipe.vae.config.sampling_rate, channels=pipe.vae.config.audio_channels, longest=full, step=full)

    @staticmethod
    def told(encoders: Encoders, caption: str, notes: Mapping[str, Any], samples: int) -> tuple[np.ndarray, Arrays]:
        counted(encoders.pipe.tokenizer, caption, encoders.pipe.tokenizer.model_max_length, "the prompt")
        return array(encoders.encode_prompts([caption])[0][0]), {}

    @staticmethod
    @torch.no_grad()
    def timing(encoders: Encoders, samples: int) -> Arrays:
        """The seconds tell where the clip ends."""
        seconds = samples / encoders.pipe.vae.config.sampling_rate
        return {"durations": array(torch.cat(encoders.pipe.encode_duration(0.0, seconds, encoders.device, False, 1), 1)[0])}
