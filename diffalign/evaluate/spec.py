"""What a recipe says about the comparison of base and aligned model, and of others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..data.spec import check_side
from ..rewards import Reward

LARGEST = 1_000_000  # of any count: far beyond any use, far below what overflows an index
FEWEST = 100  # bootstrap resamples: one alone would be an interval without width, and a verdict from nothing
STRONGEST = 10.0  # of a LoRA's strength: beyond it there is only noise
BASE, ALIGNED = "base", "aligned"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A further model, drawn with the same prompts and seeds.

    lora: safetensors file, or folder with pytorch_lora_weights.safetensors, at strength lora_scale. checkpoint: N takes the
    weights of this run's checkpoint-N. pretrained_model_name_or_path, revision, variant: another pipeline; null is the
    recipe's own base.
    """

    lora: str | None = None
    lora_scale: float = 1.0
    checkpoint: int | None = None
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self):
        if self.lora is None and self.checkpoint is None and self.pretrained_model_name_or_path is None:
            raise ValueError("lora is missing: a further model is a lora, a checkpoint or a pretrained_model_name_or_path")
        if self.checkpoint is not None and (self.lora is not None or self.pretrained_model_name_or_path is not None):
            raise ValueError("checkpoint stands alone: it is this run's weights on the recipe's base")
        if self.pretrained_model_name_or_path is None and (self.revision is not None or self.variant is not None):
            raise ValueError("revision and variant belong to a pretrained_model_name_or_path, which is missing")
        if self.checkpoint is not None and self.checkpoint < 0:
            raise ValueError(f"checkpoint must not be negative, got {self.checkpoint}")
        if not 0 <= self.lora_scale <= STRONGEST:
            raise ValueError(f"lora_scale must lie in 0..{STRONGEST:g}, got {self.lora_scale}")


def strength_side(strength: float) -> str:
    """The name of a side that a sweep over strengths adds."""
    return f"strength {strength:g}"


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Base beside aligned and others, same prompts, same seeds, judged by a reward that should not have been trained on.

    prompts: text file, one prompt a line, or a benchmark's own file (see ``prompts.py``). judge: a reward, whose verdict
    counts; null draws pictures only. rewards: further ones by name, reported beside it. training_reward: what training
    optimised; null takes an online recipe's own, or those that labelled or filtered the data, by the build.json beside it.
    models: further models by name.
    strengths: of the LoRA (of the first model without training), such as [0, 0.25, 0.5, 0.75, 1, 1.2], to find the best.
    seeds: pictures per prompt and model; the interval is a bootstrap over prompts. seed: null takes the run's.
    grid_prompts: rows of grid.png, drawn at random.

    seconds: of a clip, where models of sounds are compared; null takes the pipeline's own, and the longest of token music.
    scheduler: a diffusers class, such as LCMScheduler or EulerAncestralDiscreteScheduler; null keeps the pipeline's own.
    timestep_spacing: null keeps the scheduler's; few-step models want "trailing" (999, 749, 499, 249 for 4 steps).
    """

    prompts: str
    judge: Reward | None = None
    rewards: dict[str, Reward] = field(default_factory=dict)
    training_reward: Reward | None = None
    models: dict[str, Entrant] = field(default_factory=dict)
    strengths: tuple[float, ...] = ()
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
    seconds: float | None = None
    bootstrap_resamples: int = 10_000
    grid_prompts: int = 12

    def __post_init__(self):
        for name in ("seeds", "num_inference_steps", "batch_size", "bootstrap_resamples", "grid_prompts"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST:,}, got {getattr(self, name)}")
        if self.bootstrap_resamples < FEWEST:
            raise ValueError(f"bootstrap_resamples must be at least {FEWEST}: fewer give no interval, got "
                             f"{self.bootstrap_resamples}")
        if self.seconds is not None and not 0 < self.seconds <= LARGEST:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        for name in ("height", "width"):
            check_side(name, getattr(self, name))
        taken = next((name for name in self.models if name in (BASE, ALIGNED) or not name.strip()), None)
        if taken is not None:
            raise ValueError(f"models has one called {taken!r}: choose another name")
        if not all(0 <= s <= STRONGEST for s in self.strengths):
            raise ValueError(f"strengths must lie in 0..{STRONGEST:g}, got {list(self.strengths)}")
        sides = [strength_side(strength) for strength in self.strengths]  # 0.1 and 0.10000001 would have one name
        if len(set(sides)) < len(sides):
            raise ValueError(f"strengths must differ in their first six digits, got {list(self.strengths)}")
        taken = next((name for name in self.models if name in sides), None)
        if taken is not None:
            raise ValueError(f"models has one called {taken!r}, as a side of evaluate.strengths is: choose another name")


@dataclass(frozen=True, kw_only=True)
class CheckSpec:
    """What a recipe says about ``diffalign check``.

    reward: scores the best and the worst of each group, to be compared with the labels; null scores nothing, and the command
    loads no weights. examples: pairs of each kind (widest gap, narrowest, disagreements, random) on check.html.
    """

    reward: Reward | None = None
    examples: int = 6

    def __post_init__(self):
        if not 0 <= self.examples <= 1000:
            raise ValueError(f"examples must lie in 0..1000, got {self.examples}")
