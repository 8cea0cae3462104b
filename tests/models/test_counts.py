"""Counts that guard the speed on any machine: operations of the full-size UNet, and the bytes that its backward needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.models import LoRA, attach, enable_gradient_checkpointing, narrow_norms
from diffalign.models.counts import flops, inputs, peak_bytes, saved_bytes
from diffalign.models.published import SD35_MEDIUM, SD35_SCHEDULER, SDXL_SCHEDULER, SDXL_UNET, on_meta

GIB = 2**30
LATENT = 128  # of 1024 pixels


def sdxl(rank: int | None, dtype=torch.bfloat16):
    denoiser = on_meta("sdxl", SDXL_UNET, SDXL_SCHEDULER, dtype)
    if rank:
        with torch.device("meta"):
            attach(denoiser, LoRA(rank=rank), seed=0)
    narrow_norms(denoiser)
    denoiser.module.train()
    return denoiser


@pytest.mark.parametrize("rank, forward, training", [
    pytest.param(None, 6.76, 20.23, marks=pytest.mark.slow), pytest.param(8, 6.78, 14.13, marks=pytest.mark.slow),
    (64, 6.93, 14.56)])
def test_tflop_of_an_sdxl_image(rank, forward, training):
    """TFLOP an image at 1024x1024, counted independently before this code was written.

    A LoRA needs no gradients of the base's weights: about 2/3 of the full 3 x 6.76. Rank 64 adds 64 x 1,451,520
    multiply-adds a token and its width: 6.93 - 6.76.
    """
    counted = [n / 1e12 for n in flops(sdxl(rank), 1, LATENT, LATENT)]
    assert counted == pytest.approx([forward, training], rel=0.01)


@pytest.mark.slow
def test_checkpointing_runs_the_blocks_again():
    denoiser = sdxl(64)
    enable_gradient_checkpointing(denoiser)
    assert flops(denoiser, 1, LATENT, LATENT)[1] / 1e12 == pytest.approx(19.83, rel=0.01)
    assert saved_bytes(denoiser, 2, LATENT, LATENT, dtype=torch.bfloat16) / GIB == pytest.approx(0.91, rel=0.02)


def test_gibibytes_that_a_lora_pair_keeps():
    """10.7 GiB: 10.6 counted independently. Were every adapter's input cast to float32 and back, it would be 12.3; were norms
    computed in float32, as autocast on CUDA does unasked, 13.7.
    """
    denoiser = sdxl(64)
    assert saved_bytes(denoiser, 2, LATENT, LATENT, dtype=torch.bfloat16) / GIB == pytest.approx(10.69, rel=0.02)


@pytest.mark.slow
def test_gibibytes_with_norms_in_float32():
    denoiser = sdxl(64)
    for layer in denoiser.module.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.__class__ = nn.GroupNorm if isinstance(layer, nn.GroupNorm) else nn.LayerNorm
    assert saved_bytes(denoiser, 2, LATENT, LATENT, dtype=torch.bfloat16) / GIB == pytest.approx(13.7, rel=0.02)


@pytest.mark.slow
def test_selective_checkpointing_runs_less_again():
    """Convolutions are 0.98 of the 5.27 TFLOP that plain checkpointing adds to 14.56. There attention is products."""
    denoiser = sdxl(64)
    enable_gradient_checkpointing(denoiser, selective=True)
    assert flops(denoiser, 1, LATENT, LATENT)[1] / 1e12 == pytest.approx(19.83 - 0.98, rel=0.01)
    assert peak_bytes(denoiser, 2, LATENT, LATENT, dtype=torch.bfloat16) / GIB == pytest.approx(2.32, rel=0.02)


@pytest.mark.slow
def test_a_quarter_of_the_pixels_keeps_a_quarter():
    """512x512: 2.7 GiB counted independently, and a little more, as the text's keys and values do not shrink."""
    assert saved_bytes(sdxl(64), 2, 64, 64, dtype=torch.bfloat16) / GIB == pytest.approx(2.73, rel=0.1)


def test_sd3_takes_its_shapes():
    denoiser = on_meta("sd3", SD35_MEDIUM, SD35_SCHEDULER)
    xt, t, cond = inputs(denoiser, 3, 16, 24, tokens=154)
    assert cond.tokens.shape == (3, 154, 4096) and cond.pooled.shape == (3, 2048)
    assert denoiser(xt, t, cond).shape == xt.shape == (3, 16, 16, 24)
