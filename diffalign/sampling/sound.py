"""Clips from stock audio pipelines with whatever weights they carry, each a function of its own caption and seed.

``load_pipeline`` of ``models`` gives the pipeline of a folder (a full fine-tune's is whole), ``lora.load`` puts a run's LoRA
on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError, ModelError, ResourceError
from ..models.load import FAMILIES
from ..models.sound import SoundAdapter
from .generate import quiet, short


def family_of(pipe) -> type[SoundAdapter]:
    """The adapter of a stock pipeline. Raises ModelError for one that makes no sounds."""
    name = type(pipe).__name__
    adapter = next((one for one in FAMILIES.values() if one.pipeline == name and one.audio), None)
    if adapter is None:
        raise ModelError(f"{name} makes no sounds that are known here")
    return adapter


def rate_of(pipe) -> int:
    """Hz of the clips of a pipeline."""
    return family_of(pipe).clips(pipe).rate


def longest(pipe) -> float:
    """Seconds that the model makes at most."""
    facts = family_of(pipe).clips(pipe)
    return facts.longest / facts.rate


def clips(pipe, captions: Sequence[str], seeds: Sequence[int], *, seconds: float | None = None,
          num_inference_steps: int | None = None, guidance_scale: float | None = None,
          notes: Sequence[Mapping[str, Any]] | None = None, progress: str | None = "clips",
          drawn: Callable[[int], None] | None = None) -> Tensor:
    """One clip per (caption, seed), in their order: [n, channels, samples] float32 on the CPU, at ``rate_of(pipe)`` Hz.

    seconds: of every clip. num_inference_steps, guidance_scale: a scale of 1 draws from the model alone. None of these three
    takes the pipeline's own. notes: what a pipeline reads beside each caption (ACE-Step: lyrics and more). progress, drawn: as
    in ``generate``. Clips are drawn one at a time: padding to the longest caption of a batch would change the others. Raises
    ConfigError for a length that the model cannot make, ModelError for a clip with NaN, ResourceError when memory runs out.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"{len(captions)} captions for {len(seeds)} seeds: pass one seed per clip")
    if seconds is not None and not 0 < seconds <= longest(pipe):
        raise ConfigError(f"seconds: this model makes clips of up to {longest(pipe):.2f} s, got {seconds:g}")
    given = {family_of(pipe).seconds: seconds, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    options = {name: value for name, value in given.items() if value is not None}
    made = []
    with quiet(pipe), tqdm(total=len(captions), desc=progress, unit="clip", disable=progress is None or None) as bar:
        for i, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
            made.append(_draw(pipe, caption, int(seed), {**options, **(notes[i] if notes else {})}))
            bar.update()
            if drawn is not None:
                drawn(1)
    return torch.stack(made)


def _draw(pipe, caption: str, seed: int, options: dict) -> Tensor:
    """[channels, samples]."""
    try:
        with torch.no_grad():
            wave = pipe(caption, generator=[torch.Generator().manual_seed(seed)], output_type="pt", **options).audios[0]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError("out of memory while drawing one clip: ask for fewer seconds") from error
    wave = wave.float().cpu()
    if not wave.isfinite().all():
        raise ModelError(f'the clip of "{short(caption)}" (seed {seed}) holds NaN: the weights have diverged')
    return wave if wave.dim() == 2 else wave[None]
