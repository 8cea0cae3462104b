"""Pictures from any stock diffusers pipeline, each a function of its own prompt and seed.

Every picture has its own ``torch.Generator``, on the CPU, so it does not depend on the batch it was drawn in, on its place
in the list or on the device, and ``pipe(prompt, generator=torch.Generator().manual_seed(seed))`` draws it again anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .. import rng
from ..errors import ConfigError, ModelError, ResourceError
from ..rewards.base import as_pil

logger = logging.getLogger(__name__)


def picture_seed(seed: int, prompt: str, number: int) -> int:
    """The seed of a prompt's ``number``-th picture, 0 to 2^32 - 1. It depends on the prompt's text, not on its place."""
    return rng.integer(seed, f"sample|{prompt}", number) % 2**32


def generate(pipe, prompts: list[str], seeds: list[int], *, num_inference_steps: int = 30, guidance_scale: float = 5.0,
             batch_size: int = 8, height: int | None = None, width: int | None = None, negative_prompt: str | None = None,
             progress: str | None = "pictures", drawn: Callable[[int], None] | None = None) -> list[Image.Image]:
    """One RGB picture per (prompt, seed), in their order, from an SD, SDXL, SD3 or similar pipeline.

    height, width: pixels; None takes the model's own. progress: label of the progress bar over pictures, None for none.
    drawn: called with the number of pictures after each batch. The SDXL watermark is left off: it changes pixels.
    Raises ModelError for a picture with NaN (an SDXL VAE in float16), ConfigError for a size the model cannot draw,
    ResourceError when memory runs out. All-black pictures are warned of by name.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds: pass one seed per picture")
    _check_size(pipe, height, width)
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "height": height,
               "width": width, "output_type": "pt"}
    pictures: list[Image.Image] = []
    with quiet(pipe), tqdm(total=len(prompts), desc=progress, unit="picture", disable=_hidden(progress)) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * len(prompts[part])}
            pictures += _draw(pipe, prompts[part], seeds[part], {**options, **negative})
            bar.update(len(prompts[part]))
            if drawn is not None:
                drawn(len(prompts[part]))
    return pictures


def _hidden(progress: str | None) -> bool | None:
    return True if progress is None else None  # None: hidden when the output is no terminal


def _draw(pipe, prompts: list[str], seeds: list[int], options: dict) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    try:
        with torch.no_grad():
            result = pipe(prompt=list(prompts), generator=generators, **options)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise  # torch has no type of its own for the CPU's
        raise ResourceError(f"out of memory while drawing {len(prompts)} pictures at once: lower evaluate.batch_size, "
                            "or evaluate.height and evaluate.width") from error
    images = result.images  # [n, 3, H, W] in [0, 1], before rounding, so that NaN is still visible
    _refuse_nan(images, prompts, seeds)
    _warn_black(images, prompts, seeds, getattr(result, "nsfw_content_detected", None))
    return [as_pil(image) for image in images]


def _check_size(pipe, height: int | None, width: int | None) -> None:
    """The pipelines' own rule, said with the option's name and before anything is drawn."""
    multiple = getattr(pipe, "vae_scale_factor", 8) * getattr(pipe, "patch_size", 1)
    multiple = max(multiple, 8)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value <= 0 or value % multiple):
            near = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(f"evaluate.{name}: this model draws multiples of {multiple} pixels, got {value}; try {near}")


def _refuse_nan(images: Tensor, prompts: list[str], seeds: list[int]) -> None:
    broken = ~images.isfinite().flatten(1).all(1)
    if broken.any():
        i = int(broken.nonzero()[0])
        raise ModelError(
            f'{int(broken.sum())} of {len(images)} pictures hold NaN, first "{short(prompts[i])}" (seed {seeds[i]}): '
            "the weights have diverged, or this is SDXL's VAE in float16; load the VAE in float32 or pass the repaired one "
            "(model.pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix)")


def _warn_black(images: Tensor, prompts: list[str], seeds: list[int], flagged: list[bool] | None) -> None:
    for i, image in enumerate(images):
        if image.amax() <= 1 / 255:
            cause = "by the pipeline's safety checker" if flagged and flagged[i] else "from edge to edge"
            logger.warning('picture "%s" (seed %d) is black %s', short(prompts[i]), seeds[i], cause)


def short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet(pipe) -> Iterator[None]:
    """Without the pipeline's own progress bar and watermark, both restored afterwards."""
    bar, watermark = dict(getattr(pipe, "_progress_bar_config", {})), getattr(pipe, "watermark", None)
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    if watermark is not None:
        pipe.watermark = None
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)
        if watermark is not None:
            pipe.watermark = watermark
