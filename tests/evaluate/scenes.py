"""Synthetic but realistic sides of a comparison: rendered scenes, some with a mistake."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffalign.rewards.scenes import alter, caption, parse, random_scene, render


def prompts(n: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [caption(random_scene(random)) for _ in range(n)]


def side(mistakes: float, salt: int):
    """A model that gets a share of its prompts wrong; each picture is a function of its prompt and seed."""

    def draw(texts, seeds):
        return [picture(text, np.random.default_rng([seed, salt]), mistakes) for text, seed in zip(texts, seeds, strict=True)]

    return draw


def picture(text: str, random: np.random.Generator, mistakes: float) -> Image.Image:
    scene = parse(text)
    if scene is None:
        return Image.new("RGB", (64, 64), "#808080")
    return Image.fromarray(render(alter(scene, random) if random.random() < mistakes else scene, random))
