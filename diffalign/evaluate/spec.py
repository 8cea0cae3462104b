"""What a recipe says about the comparison of base and aligned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..rewards import Reward

LARGEST = 1_000_000  # of any count: far beyond any use, far below what overflows an index


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Base beside aligned, same prompts, same seeds, judged by a reward.

    prompts: text file, one prompt a line. judge: a reward; null draws pictures only.
    seeds: pictures per prompt and model; the interval is a bootstrap over prompts. seed: null takes the run's.
    grid_prompts: rows of grid.png, drawn at random.

    scheduler: a diffusers class, such as LCMScheduler or EulerAncestralDiscreteScheduler; null keeps the pipeline's own.
    timestep_spacing: null keeps the scheduler's; few-step models want "trailing" (999, 749, 499, 249 for 4 steps).
    """

    prompts: str
    judge: Reward | None = None
    seeds: int = 1
    seed: int | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    scheduler: str | None = None
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    batch_size: int = 8
    height: int | None = None
    width: int | None = None
    bootstrap_resamples: int = 10_000
    grid_prompts: int = 12

    def __post_init__(self):
        for name in ("seeds", "num_inference_steps", "batch_size", "bootstrap_resamples", "grid_prompts"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST:,}, got {getattr(self, name)}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
