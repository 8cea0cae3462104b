"""Rewriters without a denoiser: a stand-in draws what it understands of a text, nothing else is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from diffalign.config import load_prompts
from diffalign.language import studio
from diffalign.language.rewriter import Rewriter
from diffalign.rewards.scenes import alter, parse, render

ROOT = Path(__file__).parents[2]
REWRITER = str(ROOT / "assets" / "tiny-rewriter")
USERS = ROOT / "assets" / "prompts" / "user_train.jsonl"
HELDOUT = ROOT / "assets" / "prompts" / "user_heldout.jsonl"


def rewriter(folder: str | Path = REWRITER, **options) -> Rewriter:
    return Rewriter(pretrained_model_name_or_path=str(folder), **{"instruction": "", "max_new_tokens": 24, **options})


def users(count: int, path: Path = USERS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


class Stub:
    """In place of a pipeline: draws the scene of a caption, grey for anything else. drawn: texts and seeds, in order."""

    def __init__(self):
        self.drawn: list[tuple[str, int]] = []
        self.components = {"tokenizer": None, "tokenizer_2": SimpleTokenizer()}

    def pipeline(self, drawer, sampling, device="cpu"):
        return self

    def generate(self, pipe, prompts, seeds, **options):
        self.drawn += zip(prompts, seeds)
        return [self.picture(prompt, seed) for prompt, seed in zip(prompts, seeds)]

    @staticmethod
    def picture(text: str, seed: int) -> Image.Image:
        scene, rng = parse(text), np.random.default_rng(seed)
        if scene is None:
            return Image.new("RGB", (64, 64), (128, 128, 128))
        return Image.fromarray(render(alter(scene, rng) if seed % 4 == 0 else scene, rng))

    def put_into(self, patch) -> None:
        patch(studio.draw, "pipeline", self.pipeline)
        patch(studio, "generate", self.generate)


class SimpleTokenizer:
    """Counts words."""

    model_max_length = 20

    def __call__(self, text: str):
        return SimpleNamespace(input_ids=text.split())


def task(folder: Path, action: str, *overrides: str):
    """A recipe of 16 prompts, half of them for the pool, that asks the checker itself, and trains for an instant."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in (("users", USERS), ("heldout", HELDOUT)):
        rows = users(16 if name == "users" else 6, path)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuning = ["batch_size=4", "gradient_accumulation_steps=1", "learning_rate=1e-3", "epochs=1", "checkpointing_steps=2"]
    return load_prompts(action, ROOT / "configs" / "text" / "rewriter_tiny.yaml", [
        f"output_dir={folder / 'out'}", f"prompts={folder / 'users.jsonl'}", f"measure.prompts={folder / 'heldout.jsonl'}",
        f"rewriter.pretrained_model_name_or_path={REWRITER}", "rewriter.max_new_tokens=24",
        f"generator.pretrained_model_name_or_path={ROOT / 'assets' / 'tiny-sdxl'}", "rewards={checker: scenes}", "cpu=true",
        "evolve.prompts=8", "evolve.rounds=2", "dpo.rounds=1", "dpo.candidates=3", "evolve.score={}", "dpo.pairs={}",
        *(f"sft.{one}" for one in tuning), *(f"dpo.{one}" for one in tuning), *overrides])
