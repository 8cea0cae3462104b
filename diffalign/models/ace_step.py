"""Adapter for ACE-Step 1.5: a diffusion transformer over the latents of a waveform, told by caption, lyrics and timbre."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..process import Velocity
from ..types import Cond
from .base import unwrap
from .dit import schedule, unsupported
from .lora import save_lora
from .sound import Arrays, Clips, SoundAdapter, array

if TYPE_CHECKING:
    from .encoders import Encoders

PROMPT, LYRICS = 256, 2048  # tokens that the pipeline reads of each, and cuts without a word
TIMBRE = 30  # seconds of reference audio, here silence
ALL = 2**20  # tokens: nothing is cut


@dataclass(kw_only=True)
class AceStep(SoundAdapter):
    """ACE-Step 1.5, text to music (AceStepTransformer1DModel). A rectified flow: the velocity noise - x0, times in [0, 1].

    xt: [N, T, C], time first. cond: tokens [N, L, D], what its condition encoder makes of lyrics, timbre and caption, with
    ``attended`` [N, L], what of them is no padding; ``silence`` [N, T, C], the latents of silence, beside which a mask of ones
    says that all is to be made. The null condition is one learned vector in every token's place; the turbo models have none.

    The transformer has no mask for its condition, so that in a batch the padding of a short caption would be heard; here it is
    masked, and each row is what it would be by itself.
    """

    family, pipeline, component = "ace_step", "AceStepPipeline", "transformer"
    module_class = "AceStepTransformer1DModel"
    texts = ("text_encoder", "tokenizer", "condition_encoder")
    seconds = "audio_duration"
    notes = {"lyrics": str, "vocal_language": str, "bpm": int, "keyscale": str, "timesignature": str}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_prefix, kohya_metadata = "", {}  # no reader of that layout knows these names

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        silence, t = cond.extra["silence"].to(self.dtype), self.process.timestep(t)
        for layer in unwrap(module).layers:  # kept until the next pass: gradient checkpointing comes back
            layer.cross_attn.processor.attended = cond.extra["attended"].bool()[:, None, None]
        return module(hidden_states=xt.to(self.dtype), timestep=t, timestep_r=t, return_dict=False,
                      encoder_hidden_states=cond.tokens.to(self.dtype),
                      context_latents=torch.cat([silence, torch.ones_like(silence)], -1))[0]

    def save_lora(self, folder: Path | str, metadata: dict[str, str]) -> None:
        """As ``pipe.load_lora_weights(folder)`` reads it."""
        save_lora(self, folder, metadata)

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> AceStep:
        for layer in module.layers:
            layer.cross_attn.set_processor(_Masked(layer.cross_attn.processor))
        return cls(module=module, process=schedule(scheduler_config), param=Velocity(), identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        if (problem := unsupported(scheduler_config)) is not None:
            return problem
        inner, outer = config.get("in_channels", 192), config.get("audio_acoustic_hidden_dim", 64)
        return None if inner == 3 * outer else f"its transformer takes {inner} channels, not latents, source, mask of {outer}"

    @staticmethod
    def clips(pipe) -> Clips:
        """Clips of any length up to that of the silence that comes with the model (ten minutes)."""
        hop = math.prod(pipe.vae.config.downsampling_ratios)
        return Clips(rate=pipe.vae.config.sampling_rate, channels=pipe.vae.config.audio_channels, step=hop,
                     longest=pipe.condition_encoder.silence_latent.shape[1] * hop)

    @staticmethod
    def posterior(encoders: Encoders, wave: Tensor) -> tuple[Tensor, Tensor]:
        encoders.pipe.vae.enable_tiling()  # above 30 s, in overlapping parts: a song at once would fill any memory
        mean, std = encoders.encode_images(wave)
        return mean.transpose(1, 2), std.transpose(1, 2)

    @staticmethod
    @torch.no_grad()
    def told(encoders: Encoders, caption: str, notes: Mapping[str, Any], samples: int) -> tuple[np.ndarray, Arrays]:
        """As the pipeline tells it: lyrics are "" where a row has none, the timbre is that of silence."""
        pipe, device = encoders.pipe, encoders.device
        frames = samples // AceStep.clips(pipe).step
        text, text_mask, words, words_mask = pipe.encode_prompt(
            [caption], notes.get("lyrics", ""), device, audio_duration=frames / pipe.latents_per_second,
            max_text_length=ALL, max_lyric_length=ALL, **{name: notes[name] for name in notes if name != "lyrics"})
        for what, states, most in (("prompt, with what the pipeline says around it,", text, PROMPT),
                                   ("text of the lyrics", words, LYRICS)):
            if states.shape[1] > most:
                raise DataError(f"the {what} has {states.shape[1]} tokens, and the pipeline reads {most}; shorten it")
        silence = pipe.condition_encoder.silence_latent
        tokens, attended = pipe.condition_encoder(
            text_hidden_states=text, text_attention_mask=text_mask, lyric_hidden_states=words, lyric_attention_mask=words_mask,
            refer_audio_acoustic_hidden_states_packed=silence[:, :math.ceil(TIMBRE * pipe.latents_per_second)],
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device))
        return array(tokens[0]), {"attended": array(attended[0])}

    @staticmethod
    def beside(encoders: Encoders, samples: int) -> Arrays:
        frames = samples // AceStep.clips(encoders.pipe).step
        return {"silence": array(encoders.pipe.condition_encoder.silence_latent[0, :frames])}


class _Masked:
    """A cross-attention's own processor, told which tokens of the condition are there. attended: [N, 1, 1, L] bool."""

    def __init__(self, own):
        self.own, self.attended = own, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self.own(attn, hidden_states, encoder_hidden_states, self.attended, image_rotary_emb)
