"""VAE and text encoders of one pipeline, in float32, without its denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Adapter


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """What is known of the encoders without loading them (``load.encoder_facts``).

    spatial_factor: pixels per latent number and axis. latent_channels: C. default_resolution: pixels, the denoiser's own.
    Of audio these are samples: per latent number, and of a whole clip. scaling_factor, shift_factor: of the VAE's
    configuration. identity: {"vae": hash, "text": hash} of weights, configurations and tokenizers, for the cache key.
    """

    family: str
    spatial_factor: int
    latent_channels: int
    default_resolution: int
    scaling_factor: float
    shift_factor: float | None
    identity: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Encoders(EncoderFacts):
    """What turns pictures and prompts into what the denoiser sees."""

    pipe: Any                       # the stock pipeline; its denoiser is a stand-in with a config and nothing else
    adapter: type[Adapter]

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device

    def to(self, device) -> Encoders:
        for part in vars(self.pipe).values():  # all but the denoiser, which may be an empty one
            if isinstance(part, torch.nn.Module) and part is not getattr(self.pipe, self.adapter.component):
                part.to(device)
        if self.device.type == "cpu":  # oneDNN's convolutions: a sixth of encoding and a fifth of decoding less
            self.pipe.vae.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: [N, 3, H, W] in [-1, 1] -> mean and std of the posterior, [N, C, h, w] float32, scaled to unit variance."""
        return self.posterior(pixels)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_images``, with gradient if one is wanted."""
        with self._float32():
            posterior = self.pipe.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        shift, scale = self._scaling()
        mean, std = ((posterior.mean - shift) * scale).float(), (posterior.std * scale).float()
        return mean.contiguous(), std.contiguous()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        """-> tokens [N, L, D] float32, pooled [N, D'] float32 or None: the pipeline's own embeddings."""
        with self._float32():
            return _float(self.adapter.encode(self.pipe, list(prompts)))

    @torch.no_grad()
    def unconditional(self) -> tuple[Tensor, Tensor | None]:
        """-> tokens [1, L, D], pooled [1, D'] or None: the pipeline's branch without a prompt (zeros for SDXL base)."""
        with self._float32():
            return _float(self.adapter.unconditional(self.pipe))

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [N, C, h, w], unit variance -> pixels [N, 3, H, W] float32 in [-1, 1], with gradient if one is wanted."""
        shift, scale = self._scaling()
        with self._float32():
            pixels = self.pipe.vae.decode(latents.to(self.device, torch.float32) / scale + shift, return_dict=False)[0]
        return pixels.clamp(-1, 1).contiguous()

    def _scaling(self) -> tuple[Tensor | float, Tensor | float]:
        """Shift and scale of the unit-variance latent ``(x - shift) * scale``; per channel where the VAE says so."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (mean, std))
            return mean, config.scaling_factor / std
        return getattr(config, "shift_factor", None) or 0.0, getattr(config, "scaling_factor", 1.0)

    def _float32(self):
        """Encoding is done once and read many times, so not in half precision (SDXL's VAE overflows in fp16)."""
        return torch.autocast(self.device.type, enabled=False)


def _float(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    tokens, pooled = pair
    return tokens.float(), None if pooled is None else pooled.float()
