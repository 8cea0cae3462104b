"""What ``diffalign score`` is told."""

from __future__ import annotations

from dataclasses import dataclass

from ..rewards import Reward
from .spec import check_names


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
