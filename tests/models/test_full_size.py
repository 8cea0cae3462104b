"""Full-size networks on the meta device: no weights, but every layer and its name."""

from __future__ import annotations

import pytest
import torch

from diffalign.models import FAMILIES, LoRA, attach
from diffalign.models.lora import trained

# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, what differs from the class's defaults
SDXL_BASE = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
DDPM = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
# transformer/config.json of stabilityai/stable-diffusion-3.5-medium
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}


def build(family: str, config: dict, scheduler: dict):
    import diffusers

    adapter = FAMILIES[family]
    assert adapter.unsupported(config, scheduler) is None
    with torch.device("meta"):
        module = getattr(diffusers, adapter.module_class).from_config(config)
    return adapter.assemble(module, scheduler)


def wrapped(module) -> list[str]:
    return [name for name, layer in module.named_modules() if hasattr(layer, "lora_A") and "policy" in layer.lora_A]


@pytest.mark.parametrize("rank, expected", [(64, 92_897_280), (8, 11_612_160)])
def test_sdxl(rank, expected):
    """70 transformer blocks of two attentions of four projections are 560 layers; r (in + out) summed over them is
    1,451,520 r: 92.9 M at rank 64, 11.6 M at rank 8.

    Blocks of width 640: 2 x 2 down and 3 x 2 up = 10. Of width 1280: 2 x 10 down, 10 middle, 3 x 10 up = 60.
    Self-attention has four projections of 2d, cross-attention has q, out of 2d and k, v of d + 2048:
    per block 12 d + 2 (d + 2048) = 14 d + 4096, or 13,056 (640) and 22,016 (1280).
    10 x 13,056 + 60 x 22,016 = 1,451,520.
    """
    denoiser = build("sdxl", SDXL_BASE, DDPM)
    assert sum(p.numel() for p in denoiser.module.parameters()) == 2_567_463_684
    assert 10 * (14 * 640 + 4096) + 60 * (14 * 1280 + 4096) == 1_451_520
    assert expected == 1_451_520 * rank
    with torch.device("meta"):
        attach(denoiser, LoRA(rank=rank), seed=0)
    assert sum(p.numel() for p in trained(denoiser.module).values()) == expected
    names = wrapped(denoiser.module)
    assert len(names) == 560
    assert all(name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) for name in names)


def test_sd35_medium():
    """24 joint attentions of 8 projections, less the last block's to_add_out (absent) and add_q_proj (no effect), and 13
    second attentions of 4."""
    denoiser = build("sd3", SD35_MEDIUM, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    with torch.device("meta"):
        attach(denoiser, LoRA(rank=16), seed=0)
    names = wrapped(denoiser.module)
    assert len(names) == 24 * 8 - 2 + 13 * 4 == 242
    assert {name.split(".", 2)[2] for name in names} == {
        f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                    "to_add_out")} | {f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    # every one is 1536 -> 1536
    assert sum(p.numel() for p in trained(denoiser.module).values()) == 242 * 16 * 2 * 1536
