"""SPO's step-aware preference model: a CLIP whose picture tower knows the noise level (arXiv 2406.04314).

It reads the picture that the denoiser predicts at that level, not the noisy latent: a blurred one is judged as what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SINES, SPREAD = 256, 0.02  # width of the time's sinusoid; standard deviation of the first weights behind it


class TimeConditioning(nn.Module):
    """Adaptive layer norms of a CLIP's picture tower: every block's two norms are scaled and shifted by the time and its two
    branches gated, and the last norm is scaled and shifted; (1 + scale) x + shift. Starts as the tower without it.

    The released constructor fills all six numbers with 1, also scale and shift, which only its own initialisation mends;
    here gates are 1 and the others 0 from the start.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(SINES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.embed[0], self.embed[2]):
            nn.init.normal_(layer.weight, std=SPREAD)
            nn.init.zeros_(layer.bias)
        self.blocks = nn.ModuleList(_modulation(width, 6) for _ in range(blocks))
        self.last = _modulation(width, 2)
        for block in self.blocks:
            with torch.no_grad():
                block[1].bias.view(6, width)[[2, 5]] = 1.0

    @classmethod
    def of(cls, clip: nn.Module) -> TimeConditioning:
        vision = clip.config.vision_config
        return cls(vision.hidden_size, vision.num_hidden_layers)

    def pooled(self, clip: nn.Module, pictures: Tensor, t: Tensor) -> Tensor:
        """A transformers CLIPModel's features [N, D] of normalised pictures [N, 3, S, S] at the levels t [N] in (0, 1]."""
        tower = clip.vision_model
        time = self.embed(sines(t))
        x = tower.pre_layrnorm(tower.embeddings(pictures))
        for layer, modulation in zip(tower.encoder.layers, self.blocks, strict=True):
            shift, scale, gate, shift2, scale2, gate2 = modulation(time)[:, None].chunk(6, dim=-1)
            x = x + gate * layer.self_attn(hidden_states=layer.layer_norm1(x) * (1 + scale) + shift, attention_mask=None)[0]
            x = x + gate2 * layer.mlp(layer.layer_norm2(x) * (1 + scale2) + shift2)
        shift, scale = self.last(time).chunk(2, dim=-1)
        return clip.visual_projection(tower.post_layernorm(x[:, 0]) * (1 + scale) + shift)


def sines(t: Tensor) -> Tensor:
    """Levels [N] in (0, 1] -> [N, 256]: cosines, then sines of the timestep 1000 t - 1 (0 to 999), longest period 10,000."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(1000 * t.float() - 1, SINES, flip_sin_to_cos=True, downscale_freq_shift=0)


def _modulation(width: int, count: int) -> nn.Sequential:
    layer = nn.Linear(width, count * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)
