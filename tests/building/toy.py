"""Builds without a denoiser: a stand-in draws the prompt's scene, or an altered one, by seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffalign import run
from diffalign.building import draw
from diffalign.building.spec import BuildSpec
from diffalign.config import _build
from diffalign.rewards.scenes import alter, parse, render
from diffalign.world import left_in_order

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "assets" / "tiny-sdxl")
PROMPTS = ["a red ring on a blue background", "two green squares on a white background",
           "a yellow circle in the top left on a purple background", "a black triangle above a white ring on a red background",
           "a red ring on a blue background"]


def picture(prompt: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    scene = parse(prompt)
    for _ in range(seed % 3):
        scene = alter(scene, rng)
    return Image.fromarray(render(scene, rng))


class Stub:
    """In place of pipelines: counts what it draws."""

    def __init__(self):
        self.drawn = 0

    def pipeline(self, drawer, sampling, device="cpu"):
        return self

    def generate(self, pipe, prompts, seeds, **options):
        self.drawn += len(prompts)
        return [picture(prompt, seed) for prompt, seed in zip(prompts, seeds)]

    def put_into(self, patch) -> None:
        patch(draw, "pipeline", self.pipeline)
        patch(draw, "generate", self.generate)


def spec(folder: Path, **options) -> BuildSpec:
    """A build of five prompts by two models, two samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    tree = {"output_dir": str(folder / "out"), "prompts": str(prompts), "samples": 2, "cpu": True,
            "models": {"one": {"pretrained_model_name_or_path": MODEL}, "two": {"pretrained_model_name_or_path": MODEL}},
            "sampling": {"batch_size": 3}, "rewards": {"checker": "scenes", "bright": "brightness"}, "utility": "votes"}
    return _build(BuildSpec, {**tree, **options}, "")


def files(folder: Path) -> dict[str, bytes]:
    """What a build is judged by: its tables and its pictures."""
    out = folder / "out"
    names = [*out.glob("*.jsonl"), out / "scores.parquet", *out.glob("images/*/*")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in names}


def build(folder: Path) -> None:
    """A rank of a build."""
    Stub().put_into(setattr)
    with left_in_order():  # as the command does
        run.build(spec(folder))
