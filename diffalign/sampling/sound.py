"""Clips from stock audio pipelines with whatever weights they carry, each a function of its own caption and seed.

``load_pipeline`` of ``models`` gives the pipeline of a folder (a full fine-tune's is whole), ``lora.load`` puts a run's LoRA
on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError, ModelError, ResourceError
from .generate import quiet, short

_SECONDS = {"StableAudioPipeline": "audio_end_in_s"}  # what each pipeline calls the length of a clip


def rate_of(pipe) -> int:
    """Hz of the clips of a pipeline."""
    return int(pipe.vae.config.sampling_rate)


def longest(pipe) -> float:
    """Seconds that the model makes at most."""
    return pipe.transformer.config.sample_size * pipe.vae.hop_length / rate_of(pipe)


def clips(pipe, captions: Sequence[str], seeds: Sequence[int], *, seconds: float | None = None,
          num_inference_steps: int = 100, guidance_scale: float = 7.0, progress: str | None = "clips",
          drawn: Callable[[int], None] | None = None) -> Tensor:
    """One clip per (caption, seed), in their order: [n, channels, samples] float32 on the CPU, at ``rate_of(pipe)`` Hz.

    seconds: of every clip; None takes the longest that the model makes. guidance_scale: 1 draws from the model alone.
    progress, drawn: as in ``generate``. Clips are drawn one at a time: padding to the longest caption of a batch would change
    the others. Raises ConfigError for a length that the model cannot make, ModelError for a clip with NaN, ResourceError when
    memory runs out.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"{len(captions)} captions for {len(seeds)} seeds: pass one seed per clip")
    seconds = longest(pipe) if seconds is None else seconds
    if not 0 < seconds <= longest(pipe):
        raise ConfigError(f"seconds: this model makes clips of up to {longest(pipe):.2f} s, got {seconds:g}")
    options = {_SECONDS[type(pipe).__name__]: seconds, "num_inference_steps": num_inference_steps,
               "guidance_scale": guidance_scale, "output_type": "pt"}
    made = []
    with quiet(pipe), tqdm(total=len(captions), desc=progress, unit="clip", disable=progress is None or None) as bar:
        for caption, seed in zip(captions, seeds, strict=True):
            made.append(_draw(pipe, caption, int(seed), options))
            bar.update()
            if drawn is not None:
                drawn(1)
    return torch.stack(made)


def _draw(pipe, caption: str, seed: int, options: dict) -> Tensor:
    """[channels, samples]."""
    try:
        with torch.no_grad():
            wave = pipe(caption, generator=[torch.Generator().manual_seed(seed)], **options).audios[0]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError("out of memory while drawing one clip: ask for fewer seconds") from error
    wave = wave.float().cpu()
    if not wave.isfinite().all():
        raise ModelError(f'the clip of "{short(caption)}" (seed {seed}) holds NaN: the weights have diverged')
    return wave if wave.dim() == 2 else wave[None]
