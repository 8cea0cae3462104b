"""Full-size networks on the meta device: no weights, but every layer and its name."""

from __future__ import annotations

import pytest
import torch

from diffalign.models import FAMILIES, LoRA, attach
from diffalign.models.lora import trained
from diffalign.models.published import SD35_MEDIUM, SD35_SCHEDULER, SDXL_SCHEDULER, SDXL_UNET, on_meta


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
