"""What a recipe says about the preference data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LARGEST_SIDE = 16_384  # pixels; beyond it one picture alone would not fit into any memory


def check_side(name: str, pixels: int | None) -> None:
    """Raises ValueError for a picture's side that no memory would hold, or no model can draw; None is the model's own."""
    if pixels is not None and not 8 <= pixels <= LARGEST_SIDE:
        raise ValueError(f"{name} is in pixels, at least 8 and at most {LARGEST_SIDE}, got {pixels}")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Preference data and how it becomes latents.

    path: parquet, CSV, JSON or JSONL file, tar shards (one, shards-{000..099}.tar or a pattern with *), folder, or hub data
    set id. layout: "auto" detects it from the columns.
    image_root: folder that paths inside the data set are relative to; null is the data file's own. No path may leave it.
    streaming: read a hub data set without storing it (local files are always streamed). max_train_samples: groups taken
    from the front, counted after ties are dropped and before validation_share is set apart.
    ties: drop them, keep them as soft labels, or refuse the data set. bad_rows: stop at the first corrupt row, or skip it
    (skipped rows are named and counted). max_pixels: larger pictures are bad rows, known from their header.
    resolution: pixels of a square picture's side; null takes the model's own. aspect_ratio_buckets: crop every group to the
    nearest of some shapes of equal area, never stretch. center_crop: false crops each picture at a place drawn once.
    random_flip: mirrors whole groups, per visit. caption_dropout: share of (row, visit) whose prompt becomes the
    unconditional one. validation: a second data set of the same layout for held-out preference accuracy (validation_split:
    its split, null the same as ``split``), or validation_share of the prompts. cache_dir: where latents and text embeddings
    are kept; null puts them beside output_dir. heldout_prompts: text file; ``check`` reports leakage into it.
    Of text alone: chat_template puts prompts into the tokenizer's template, for a model tuned on dialogues. max_tokens:
    longest prompt and answer together; null takes the model's own limit. Longer rows are bad rows.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    layout: Literal["auto", "pickapic", "pickapic_scored", "chosen_rejected", "scored", "unpaired", "prompts"] = "auto"
    image_root: str | None = None
    streaming: bool = False
    max_train_samples: int | None = None
    ties: Literal["drop", "soft", "refuse"] = "drop"
    bad_rows: Literal["refuse", "skip"] = "refuse"
    max_pixels: int = 100_000_000
    resolution: int | None = None
    aspect_ratio_buckets: bool = False
    center_crop: bool = True
    random_flip: bool = False
    caption_dropout: float = 0.0
    validation: str | None = None
    validation_split: str | None = None
    validation_share: float = 0.0
    heldout_prompts: str | None = None
    cache_dir: str | None = None
    cache_dtype: Literal["float32", "float16"] = "float32"
    encode_batch_size: int = 8
    chat_template: bool = False
    max_tokens: int | None = None

    def __post_init__(self):
        if not self.path.strip():
            raise ValueError("path is empty; give a file, a folder or a hub data set id")
        for name in ("caption_dropout", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("max_train_samples", "max_pixels", "encode_batch_size", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.validation is not None and self.validation_share:
            raise ValueError("give validation (a second data set) or validation_share, not both")
        check_side("resolution", self.resolution)
