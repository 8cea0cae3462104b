"""Builds without a denoiser: a stand-in draws the prompt's scene, or an altered one, by seed alone.

``python -m tests.building.toy FOLDER RANK WORLD`` is one rank of a build over gloo; a file is the meeting point.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
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


if __name__ == "__main__":
    import torch.distributed as dist

    here, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{here}/meet", rank=rank, world_size=world,
                            timeout=timedelta(seconds=50))
    Stub().put_into(setattr)
    with left_in_order():  # as the command does
        run.build(spec(here))
