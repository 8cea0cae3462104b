"""Pictures depend on their own prompt and seed and on nothing else: tiny random pipelines of three families."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from diffalign import _compat  # noqa: F401
from diffalign.errors import ConfigError, ModelError, ResourceError
from diffalign.sampling import generate, picture_seed

from ..models import tiny

PROMPTS = ["a red ring", "a blue circle", "red", "a ring on a red ring", "blue"]
SEEDS = [3, 1, 4, 1, 5]
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "progress": None}


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def pipe(request, tmp_path_factory):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(tiny.make(request.param, tmp_path_factory.mktemp(request.param)))


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_batch_size_and_order_do_not_matter(pipe, monkeypatch):
    floats = []
    original = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, **k: floats.append(original(self, **k)) or floats[-1])
    one, five = (
        generate(pipe, PROMPTS, SEEDS, batch_size=1, **OPTIONS),
        generate(pipe, PROMPTS, SEEDS, batch_size=5, **OPTIONS),
    )
    singles, batch = torch.cat([out.images for out in floats[:5]]), floats[5].images
    assert (singles - batch).abs().max() < 1e-4  # before rounding to bytes
    turned = generate(pipe, PROMPTS[::-1], SEEDS[::-1], batch_size=2, **OPTIONS)[::-1]
    assert np.abs(arrays(one) - arrays(five)).max() <= 1 and np.abs(arrays(one) - arrays(turned)).max() <= 1
    assert np.abs(arrays(one)[1] - arrays(one)[3]).max() > 1  # same seed, another prompt
    other = generate(pipe, PROMPTS[:1], [4], **OPTIONS)
    assert np.abs(arrays(other)[0] - arrays(one)[0]).max() > 10  # another seed


def test_stock_pipeline_draws_the_same_picture(pipe):
    ours = generate(pipe, PROMPTS[:1], SEEDS[:1], **OPTIONS)
    stock = pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(3)).images
    assert np.abs(arrays(ours) - arrays(stock)).max() <= 1


def test_size_and_negative_prompt_reach_the_pipeline(pipe):
    plain = generate(pipe, PROMPTS[:2], SEEDS[:2], height=16, width=32, **OPTIONS)
    negative = generate(pipe, PROMPTS[:2], SEEDS[:2], height=16, width=32, negative_prompt="blue", **OPTIONS)
    assert plain[0].size == (32, 16) and np.abs(arrays(plain) - arrays(negative)).max() > 0
    with pytest.raises(ConfigError, match="evaluate.height: .* multiples of 8 pixels, got 13; try 16"):
        generate(pipe, PROMPTS[:1], [1], height=13, width=16, **OPTIONS)


def test_global_random_state_is_neither_read_nor_moved(pipe):
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), generate(pipe, PROMPTS[:1], [1], **OPTIONS)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert np.array_equal(arrays(first), arrays(generate(pipe, PROMPTS[:1], [1], **OPTIONS)))


def test_bar_and_watermark_are_put_back(pipe):
    pipe.set_progress_bar_config(desc="mine")
    pipe.watermark = "a watermark that nothing may call"
    seen = []
    try:
        generate(pipe, PROMPTS, SEEDS, batch_size=2, drawn=seen.append, **OPTIONS)
        assert pipe._progress_bar_config == {"desc": "mine"} and pipe.watermark.startswith("a watermark")
        assert seen == [2, 2, 1]
    finally:
        pipe.watermark = None
        pipe.set_progress_bar_config()


def broken(pipe, value: float):
    """The decoder's last bias is what an overflow leaves behind."""
    bias = pipe.vae.decoder.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(value)
    return bias, kept


def test_nan_pictures_are_named(pipe):
    bias, kept = broken(pipe, float("nan"))
    try:
        with pytest.raises(ModelError, match=r'2 of 2 pictures hold NaN, first "a red ring" \(seed 3\): .*float16'):
            generate(pipe, PROMPTS[:2], SEEDS[:2], **OPTIONS)
    finally:
        bias.data.copy_(kept)


def test_black_pictures_are_warned_of(pipe, caplog):
    bias, kept = broken(pipe, -1e4)
    try:
        with caplog.at_level(logging.WARNING):
            images = generate(pipe, PROMPTS[:1], SEEDS[:1], **OPTIONS)
        assert 'picture "a red ring" (seed 3) is black from edge to edge' in caplog.text and arrays(images).max() == 0
    finally:
        bias.data.copy_(kept)


def test_out_of_memory_names_the_option():
    class Full:
        def set_progress_bar_config(self, **_): ...

        def __call__(self, **_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match="drawing 2 pictures at once: lower evaluate.batch_size"):
        generate(Full(), PROMPTS[:2], SEEDS[:2], progress=None)


def test_picture_seeds_are_pinned():
    """A changed seed would change everybody's comparison: these two are a promise."""
    assert [picture_seed(0, "a red ring", 0), picture_seed(0, "a red ring", 1)] == SEED_PINS
    assert len({picture_seed(s, p, n) for s in range(5) for p in PROMPTS for n in range(5)}) == 125


SEED_PINS = [1873151644, 769753600]
