"""Adapter for AudioLDM 2: a UNet over the latents of a log-mel spectrogram, which reads two texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..types import Cond
from .sound import Arrays, Clips, SoundAdapter, array, counted
from .unet import ATTENTION, PARAMETERIZATIONS, schedule, unsupported

if TYPE_CHECKING:
    from .encoders import Encoders

RATE, WINDOW, FLOOR, PEAK = 16_000, 1024, 1e-5, 0.5  # Hz, samples, of a mel bin's magnitude, of a waveform


@dataclass(kw_only=True)
class AudioLDM2(SoundAdapter):
    """AudioLDM 2 and AudioLDM 2 Music (AudioLDM2UNet2DConditionModel).

    xt: [N, C, frames / 4, mels / 4]. cond: tokens [N, 8, D], the states that GPT-2 goes on with after the texts of CLAP and
    T5; extra ``t5`` [N, L, D'] and ``attended`` [N, L], the states of T5 and what of them is no padding. The null condition is
    the empty caption, filled up to the caption's own length in T5.
    """

    family, pipeline, component = "audioldm2", "AudioLDM2Pipeline", "unet"
    module_class, library = "AudioLDM2UNet2DConditionModel", "audioldm2"
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "projection_model", "language_model", "vocoder",
             "feature_extractor")
    seconds = "audio_length_in_s"
    lora_targets = ATTENTION
    kohya_prefix, kohya_metadata = "", {}  # no reader of that layout knows this model

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return module(xt.to(self.dtype), self.process.timestep(t), encoder_hidden_states=cond.tokens.to(self.dtype),
                      encoder_hidden_states_1=cond.extra["t5"].to(self.dtype), return_dict=False,
                      encoder_attention_mask_1=cond.extra["attended"].to(self.dtype))[0]

    def recompute(self) -> Callable:
        return _recompute

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> AudioLDM2:
        param = PARAMETERIZATIONS[scheduler_config.get("prediction_type", "epsilon")]
        return cls(module=module, process=schedule(scheduler_config), param=param, identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        return unsupported(config, scheduler_config)

    @staticmethod
    def clips(pipe) -> Clips:
        """All latents are of one length, as in its training: a shorter clip is a full one whose end is silent."""
        config, text = pipe.vocoder.config, type(pipe.text_encoder_2).__name__
        if text != "T5EncoderModel":
            raise ModelError(f"this AudioLDM 2 reads its second text by a {text}, and T5EncoderModel is what is supported")
        if config.sampling_rate != RATE:
            raise ModelError(f"this AudioLDM 2 makes {config.sampling_rate} Hz, and its front end is known for {RATE} Hz only")
        full = pipe.unet.config.sample_size * pipe.vae_scale_factor * hop_of(pipe)
        return Clips(rate=RATE, channels=1, longest=full, step=full)

    @staticmethod
    def posterior(encoders: Encoders, wave: Tensor) -> tuple[Tensor, Tensor]:
        mel = log_mel(wave[0, 0].numpy(), hop_of(encoders.pipe), encoders.pipe.vocoder.config.model_in_dim)
        return encoders.encode_images(torch.from_numpy(mel)[None, None])

    @staticmethod
    @torch.no_grad()
    def told(encoders: Encoders, caption: str, notes: Mapping[str, Any], samples: int) -> tuple[np.ndarray, Arrays]:
        """One caption at a time: padding to the longest of several would move the positions at which GPT-2 goes on."""
        pipe = encoders.pipe
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
            counted(tokenizer, caption, tokenizer.model_max_length, "the prompt")
        t5, attended, generated = pipe.encode_prompt([caption], encoders.device, 1, False)
        return array(generated[0]), {"t5": array(t5[0]), "attended": array(attended[0])}


def hop_of(pipe) -> int:
    """Samples from one frame of the spectrogram to the next: what the vocoder makes of it."""
    return int(np.prod(pipe.vocoder.config.upsample_rates))


def log_mel(wave: np.ndarray, hop: int, mels: int) -> np.ndarray:
    """wave: [samples] at 16 kHz, samples a multiple of hop -> [samples / hop, mels] float32, what the VAE encodes.

    As AudioLDM was trained (its released training code): mean 0 and peak 0.5 of what is there before the silence that fills
    it up, Hann windows of 64 ms over the mirrored ends, Slaney's mel bins up to 8 kHz of the magnitude, natural logarithm from
    1e-5 on. Loudness is therefore not compared.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    clip = np.trim_zeros(wave, "b")  # with the silence in its mean, an offset would sound on, the other way round
    clip = clip - clip.mean()
    clip = PEAK * clip / (np.abs(clip).max() + 1e-8)
    wave = np.pad(np.pad(clip, (0, len(wave) - len(clip))), (WINDOW - hop) // 2, mode="reflect")
    bins = mel_filter_bank(WINDOW // 2 + 1, mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return spectrogram(wave, window_function(WINDOW, "hann"), frame_length=WINDOW, hop_length=hop, power=1.0, center=False,
                       mel_filters=bins, mel_floor=FLOOR, log_mel="log").T.astype(np.float32)


def _recompute(layer: nn.Module, *args):
    """The UNet calls its attention layers by place under gradient checkpointing, in another order than they take: the text's
    mask would be that of the self-attention (an error in diffusers 0.42, whatever the sizes)."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if not isinstance(layer, Transformer2DModel):
        return layer(*args)
    hidden, states, _, _, _, own, mask = args
    return layer(hidden, states, attention_mask=own, encoder_attention_mask=mask, return_dict=False)
