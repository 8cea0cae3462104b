"""Who carries an edit out: instruction-editing pipelines of diffusers, loaded from safetensors and without remote code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from ..errors import ModelError, ResourceError

PIPELINES = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")


class Editor(Protocol):
    """N RGB pictures of any sizes, N lists of edits, N seeds -> N pictures of the same sizes; no edits at all still take the
    picture through the editor. The same input gives the same bytes.

    batch_size: pictures that belong together in a call. multiple: of pixels, that both sides must be.
    """

    batch_size: int
    multiple: int

    def __call__(self, images: Sequence[Image.Image], edits: Sequence[Sequence[str]],
                 seeds: Sequence[int]) -> list[Image.Image]: ...


@dataclass(frozen=True, kw_only=True)
class InstructPix2Pix:
    """A StableDiffusionInstructPix2PixPipeline, or its SDXL sister, in one call with the edits joined by semicolons.

    folder: the pipeline's. guidance_scale: of the edit's text; image_guidance_scale: how closely to keep to the picture.
    batch_size: pictures of one size drawn at once. dtype: what it computes in. device: null takes CUDA where there is one.
    """

    folder: str
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    batch_size: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    multiple = 8

    def __post_init__(self):
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.guidance_scale < 1 or self.image_guidance_scale < 1:
            raise ValueError("guidance_scale and image_guidance_scale must be at least 1, got "
                             f"{self.guidance_scale} and {self.image_guidance_scale}")

    def check(self) -> None:
        """Raises ModelError for a folder that is no such pipeline in whole safetensors files, ConfigError for a device that is
        not here; loads no weights."""
        from ..rewards.weights import on_device

        self._inspected()
        on_device(self.device)

    def identity(self) -> dict[str, Any]:
        from ..models.folder import WEIGHTED, digest

        folder = self._inspected()
        files = [file for part in WEIGHTED if part in folder.components for file in folder.weights(part)]
        options = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "batch_size", "dtype")
        return {"editor": folder.pipeline, "weights_sha256": digest(files), **{name: getattr(self, name) for name in options}}

    def __call__(self, images: Sequence[Image.Image], edits: Sequence[Sequence[str]],
                 seeds: Sequence[int]) -> list[Image.Image]:
        """Raises ModelError for a picture with NaN, ResourceError when memory runs out."""
        result: list[Image.Image | None] = [None] * len(images)
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            by_size.setdefault(image.size, []).append(place)
        for size, places in by_size.items():
            for start in range(0, len(places), self.batch_size):
                part = places[start:start + self.batch_size]
                drawn = self._draw(size, [images[i] for i in part], ["; ".join(edits[i]) for i in part],
                                   [seeds[i] for i in part])
                for place, image in zip(part, drawn, strict=True):
                    result[place] = image
        return result

    def _draw(self, size: tuple[int, int], images: list[Image.Image], texts: list[str], seeds: list[int]) -> list[Image.Image]:
        from ..rewards.base import as_pil

        pipe = self._pipe
        sized = {"width": size[0], "height": size[1]} if type(pipe).__name__ == PIPELINES[1] else {}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # a picture does not depend on its batch
        try:
            with torch.no_grad():
                drawn = pipe(prompt=texts, image=list(images), num_inference_steps=self.num_inference_steps,
                             guidance_scale=self.guidance_scale, image_guidance_scale=self.image_guidance_scale,
                             generator=generators, output_type="pt", **sized).images
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(f"out of memory while editing {len(images)} pictures of {size[0]} x {size[1]} at once: lower "
                                "editor.batch_size or resolution") from error
        if not torch.isfinite(drawn).all():
            raise ModelError(f"{self.folder}: the editor drew NaN; set editor.dtype=float32, or bfloat16")
        return [as_pil(image) for image in drawn.float()]

    def _inspected(self):
        from ..models.folder import check_components, read_folder

        path = Path(self.folder)
        if not path.is_dir():
            raise ModelError(f"{self.folder}: no such folder; download the editing pipeline once, such as with "
                             "`hf download OWNER/NAME --local-dir FOLDER`, and name that folder")
        folder = read_folder(path, self.folder)
        if folder.pipeline not in PIPELINES:
            raise ModelError(f"{self.folder}: a {folder.pipeline} follows no edits; supported are {' and '.join(PIPELINES)}")
        check_components(folder, folder.components)
        return folder

    @cached_property
    def _pipe(self) -> Any:
        from .. import _compat  # noqa: F401, I001  (before diffusers)
        import diffusers

        from ..models.folder import IGNORED
        from ..models.load import quiet_bars
        from ..rewards.weights import on_device

        quiet_bars()
        folder = self._inspected()
        absent = {name: None for name in folder.index if name in IGNORED}
        if folder.pipeline == PIPELINES[0]:
            absent["requires_safety_checker"] = False
        device = on_device(self.device)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
                pipe = getattr(diffusers, folder.pipeline).from_pretrained(
                    folder.path, torch_dtype=getattr(torch, self.dtype), use_safetensors=True, local_files_only=True, **absent)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{self.folder}: cannot be loaded ({reason})") from error
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "watermark"):
            pipe.watermark = None  # it would mark every edited picture
        return pipe.to(device)


EDITORS = {"instruct_pix2pix": InstructPix2Pix}
