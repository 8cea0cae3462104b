"""Full-size networks on the meta device: no weights, but every layer and its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffalign.models import FAMILIES, LoRA, attach
from diffalign.models.lora import trained
from diffalign.models.published import SD35_MEDIUM, SD35_SCHEDULER, SDXL_SCHEDULER, SDXL_UNET, on_meta
from diffalign.types import Cond


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
    assert FAMILIES["sdxl"].unsupported(SDXL_UNET, SDXL_SCHEDULER) is None
    denoiser = on_meta("sdxl", SDXL_UNET, SDXL_SCHEDULER)
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
    assert FAMILIES["sd3"].unsupported(SD35_MEDIUM, SD35_SCHEDULER) is None
    denoiser = on_meta("sd3", SD35_MEDIUM, SD35_SCHEDULER)
    with torch.device("meta"):
        attach(denoiser, LoRA(rank=16), seed=0)
    names = wrapped(denoiser.module)
    assert len(names) == 24 * 8 - 2 + 13 * 4 == 242
    assert {name.split(".", 2)[2] for name in names} == {
        f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                    "to_add_out")} | {f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    # every one is 1536 -> 1536
    assert sum(p.numel() for p in trained(denoiser.module).values()) == 242 * 16 * 2 * 1536


def test_audioldm2():
    """346 M, as published for AudioLDM 2-Full (Tango's repository). 10.24 s are 1024 frames of 64 mels, latents [8, 256, 16].
    Transformers of three kinds (two self-attentions, GPT-2's states, T5's) at 2 + 2 + 2 places down, 1 in the middle,
    3 + 3 + 3 up are 48 of two attentions of four projections: 384 layers."""
    config = {"sample_size": 256, "in_channels": 8, "out_channels": 8, "block_out_channels": [128, 256, 384, 640],
              "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, "attention_head_dim": [4, 8, 12, 20],
              "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "cross_attention_dim": [[None, 768, 1024]] * 4}
    scheduler = {"_class_name": "DDIMScheduler", "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    assert FAMILIES["audioldm2"].unsupported(config, scheduler) is None
    denoiser = on_meta("audioldm2", config, scheduler)
    assert sum(p.numel() for p in denoiser.module.parameters()) == 346_943_496
    with torch.device("meta"):
        cond = Cond(tokens=torch.empty(2, 8, 768), extra={"t5": torch.empty(2, 20, 1024), "attended": torch.ones(2, 20)})
        xt, t = torch.empty(2, 8, 256, 16), torch.ones(2)
        denoiser.process = replace(denoiser.process, alphas_cumprod=torch.empty(1000))
        assert denoiser(xt, t, cond).shape == xt.shape
        attach(denoiser, LoRA(rank=4), seed=0)
    assert len(wrapped(denoiser.module)) == 3 * (6 + 1 + 9) * 8 == 384
