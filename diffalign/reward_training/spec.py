"""What a recipe says about training a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..data.spec import DataSpec
from ..models.spec import LARGEST_RANK, ModelSpec
from ..rewards.base import Reward
from ..rewards.heads import BradleyTerry, Head


@dataclass(frozen=True, kw_only=True)
class RewardLora:
    """Low-rank updates of the backbone's layers. target_modules: layers whose names end so. alpha: null takes the rank.

    learning_rate: of the updates; the head takes the recipe's.
    """

    rank: int = 8
    alpha: float | None = None
    learning_rate: float = 3e-4
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection",
                                       "text_projection")

    def __post_init__(self):
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"rank must be at least 1 and at most {LARGEST_RANK}, got {self.rank}")
        for name in ("alpha", "learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Makes the reward step-aware (SPO, arXiv 2406.04314): its picture tower learns the noise level, and sees in place of a
    picture what ``model`` predicts of it from that level, at guidance_scale. The two pictures of a pair share level and noise;
    levels are uniform.
    """

    model: ModelSpec
    guidance_scale: float = 1.0

    def __post_init__(self):
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """A reward to be trained: ``output_dir``/reward gets config.json, model.safetensors and reward.json.

    backbone: a CLIP in transformers' layout, folder or hub id (backbone_revision pins it). data: pairs, soft labels or ranked
    groups (all pairs of a group); its validation part is held out and only measured; ties are dropped, or with data.ties=soft
    kept as targets of one half. head: bradley_terry, pal_angle or pal_distance. features: "frozen" encodes every picture and
    prompt once and keeps the features in memory; "lora" trains low-rank updates of both towers, too, "whole" all their
    weights with the recipe's learning_rate. steps: a step-aware reward.
    epochs: at most; stop_share: share of the training prompts set apart to stop early, patience: epochs without a lower loss
    there (the best epoch is kept); 0 of either trains all epochs and keeps the last. balance: every pair, prompt or user
    weighs the same. compare: rewards whose agreement with the held-out labels is reported beside.
    """

    output_dir: str
    backbone: str
    data: DataSpec
    backbone_revision: str | None = None
    head: Head = BradleyTerry()
    features: Literal["frozen", "lora", "whole"] = "frozen"
    steps: StepSpec | None = None
    lora: RewardLora = RewardLora()
    epochs: int = 30
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    batch_size: int = 64
    encode_batch_size: int = 64
    balance: Literal["pairs", "prompts", "users"] = "pairs"
    stop_share: float = 0.1
    patience: int = 5
    compare: tuple[Reward, ...] = ()
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a folder for the reward's files")
        if not self.backbone.strip():
            raise ValueError("backbone is empty; give the folder or hub id of a CLIP")
        if self.steps is not None and self.features == "frozen":
            raise ValueError("features is frozen, but a step-aware reward learns to see: use lora or whole")
        if self.steps is not None and self.head.pluralistic:
            raise ValueError("steps and a pluralistic head exclude each other; leave one of them out")
        for name in ("epochs", "batch_size", "encode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("weight_decay", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("warmup_share", "stop_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
