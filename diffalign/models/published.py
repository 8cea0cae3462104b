"""Published configurations, to build a full-size model without a download: what differs from the classes' defaults.

Of stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0 and the transformer of
stabilityai/stable-diffusion-3.5-medium; `MODELS` finds them by their ids.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Adapter
from .load import FAMILIES

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                  "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.13025,
}
SDXL_TEXTS = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
     "projection_dim": 768, "hidden_act": "quick_gelu"},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
     "projection_dim": 1280, "hidden_act": "gelu"})
SDXL_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                  "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}
SD35_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

MODELS: dict[str, tuple[str, dict, dict]] = {  # hub id -> family, denoiser's and scheduler's configuration
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd", SD15_UNET, SD15_SCHEDULER),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", SDXL_UNET, SDXL_SCHEDULER),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", SD35_MEDIUM, SD35_SCHEDULER),
}


def on_meta(family: str, config: dict[str, Any], scheduler: dict[str, Any], dtype: torch.dtype = torch.float32) -> Adapter:
    """The denoiser of this configuration on the meta device: every layer and its name, no weights."""
    import diffusers

    adapter = FAMILIES[family]
    with torch.device("meta"):
        module = getattr(diffusers, adapter.module_class).from_config(config)
    torch.nn.Module.to(module, dtype)  # diffusers' own warns of layers to keep in float32, of which no family here has any
    return adapter.assemble(module, scheduler)
