"""What a recipe says about the building of a preference data set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..data.spec import check_side
from ..models.spec import ModelSpec
from ..rewards import Reward
from .select import Groups, Select
from .types import Filter
from .utility import Utility

LARGEST = 1_000_000  # of any count: far beyond any use, far below what overflows an index
NAME = re.compile(r"[\w][\w.+-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn; sizes in pixels, null takes the model's own.

    scheduler: a diffusers class; null keeps the pipeline's own. timestep_spacing: null keeps the scheduler's. dtype: what the
    pipeline computes in (SDXL's own VAE gives NaN in float16). batch_size: pictures drawn at once.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 8

    def __post_init__(self):
        for name in ("num_inference_steps", "batch_size"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST:,}, got {getattr(self, name)}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        for name in ("height", "width"):
            check_side(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """A pipeline that draws candidates: a folder or hub id, perhaps with a LoRA (file, or folder that holds
    pytorch_lora_weights.safetensors) at the strength ``lora_scale``. sampling: null takes the recipe's.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    pretrained_vae_model_name_or_path: str | None = None
    fuse_lora: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    sampling: Sampling | None = None

    def __post_init__(self):
        if self.lora is not None and not self.lora.strip():
            raise ValueError("lora is empty; give a LoRA file or folder, or null")
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"lora_scale needs a lora, got {self.lora_scale} without one")
        _ = self.model  # refuses what it would

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(pretrained_model_name_or_path=self.pretrained_model_name_or_path, revision=self.revision,
                         variant=self.variant, pretrained_vae_model_name_or_path=self.pretrained_vae_model_name_or_path,
                         fuse_lora=self.fuse_lora, lora=None)


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """Prompts -> samples of one or several models -> rewards -> ranked groups or pairs.

    prompts: text file of one a line, or .tsv with columns Prompt and Category; max_prompts: from the front. models: what
    draws, by name. samples: pictures per prompt and model. rewards: what scores, by name. utility: how several rewards become
    one number; null takes the one reward's score. filters: applied to the groups in turn. select: what the table holds.
    heldout_prompts: prompts that nothing may be built on; one of them among the prompts is refused.
    overwrite: where output_dir holds a build of another recipe, remove it and start anew. cpu: leave the GPU alone.
    """

    output_dir: str
    prompts: str
    models: dict[str, Drawer]
    rewards: dict[str, Reward]
    seed: int = 0
    max_prompts: int | None = None
    samples: int = 4
    sampling: Sampling = Sampling()
    utility: Utility | None = None
    filters: tuple[Filter, ...] = ()
    select: Select = Groups()
    heldout_prompts: str | None = None
    overwrite: bool = False
    cpu: bool = False

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a folder for the data set")
        for name, noun in (("models", "model"), ("rewards", "reward")):
            check_names(name, getattr(self, name), noun)
        for name in ("samples", "max_prompts"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST:,}, got {getattr(self, name)}")
        if self.samples * len(self.models) < 2:
            raise ValueError("samples must be at least 2 with one model: one picture has nothing to be compared with")
        if self.utility is None and len(self.rewards) > 1:
            raise ValueError("utility is missing: say how several rewards become one number, such as utility=votes, "
                             "utility=mean or utility={kind: reward, reward: NAME}")
        read = self.utility.reads(tuple(self.rewards)) if self.utility else tuple(self.rewards)
        lost = [name for name in read if name not in self.rewards]
        if not read:
            raise ValueError("utility reads no reward: its weights must not all be 0")
        if lost:
            raise ValueError(f"utility names the reward '{lost[0]}', which is not among rewards: {', '.join(self.rewards)}")
        for number, one in enumerate(self.filters):
            name = getattr(one, "reward", None)
            if name is not None and name not in self.rewards:
                raise ValueError(f"filters.{number}.reward names '{name}', which is not among rewards: "
                                 f"{', '.join(self.rewards)}")


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """Rewards over the pictures of a data set.

    rewards: by name; a column score_<name> each. data: parquet, CSV, JSON or JSONL file, a folder of pictures, or that of a
    build. output: null puts it beside the data. split, image_root: as in a training recipe. max_pixels: larger pictures are
    not scored. overwrite: replace an output of other rewards or data. cpu: leave the GPU alone.
    """

    rewards: dict[str, Reward]
    data: str
    output: str | None = None
    split: str = "train"
    image_root: str | None = None
    max_pixels: int = 100_000_000
    overwrite: bool = False
    cpu: bool = False

    def __post_init__(self):
        check_names("rewards", self.rewards, "reward")
        if not self.data.strip():
            raise ValueError("data is empty; give a file or a folder")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")


def check_names(option: str, table: dict, noun: str) -> None:
    """Raises ValueError: names become columns and parts of keys."""
    if not table:
        raise ValueError(f"{option} is empty; name at least one {noun}")
    odd = [name for name in table if not NAME.fullmatch(name)]
    if odd:
        raise ValueError(f"{option} holds the name {odd[0]!r}; a name is up to 64 letters, digits, '_', '-', '+' and '.'")
