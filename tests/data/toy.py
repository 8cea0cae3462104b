"""Pictures, data sets and encoders small enough to reason about."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffalign.data.spec import DataSpec

FACTOR, CHANNELS, LENGTH, WIDTH = 4, 4, 5, 6


def picture(seed: int, size: tuple[int, int] = (16, 16), format: str = "PNG", **save) -> bytes:
    """Bytes of a smooth random picture; size is (width, height)."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format, **save)
    return file.getvalue()


class ToyEncoders:
    """Fulfils the ``Encoders`` contract with average pooling and hashed words. calls: batch sizes, in order."""

    def __init__(self, family: str = "sdxl", vae: str = "vae-1", text: str = "text-1", broken: bool = False):
        self.family, self.spatial_factor, self.latent_channels, self.default_resolution = family, FACTOR, CHANNELS, 16
        self.identity, self.broken = {"vae": vae, "text": text}, broken
        self.calls: list[tuple[str, int]] = []

    def encode_images(self, pixels: torch.Tensor):
        self.calls.append(("images", len(pixels)))
        pooled = torch.nn.functional.avg_pool2d(pixels, FACTOR)
        mean = torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1)
        if self.broken:
            mean = torch.where(pooled.mean((1, 2, 3), keepdim=True) > 0.9, torch.nan, mean)
        return mean, 0.1 + 0.05 * mean.abs()

    def encode_prompts(self, prompts: list[str]):
        self.calls.append(("prompts", len(prompts)))
        numbers = [[float(sum(prompt.encode()) * (i + 1) % 97) for i in range(LENGTH * WIDTH + WIDTH)] for prompt in prompts]
        table = torch.tensor(numbers) / 97
        pooled = table[:, LENGTH * WIDTH:] if self.family == "sdxl" else None
        return table[:, :LENGTH * WIDTH].view(-1, LENGTH, WIDTH), pooled

    def unconditional(self):
        return torch.zeros(1, LENGTH, WIDTH), torch.zeros(1, WIDTH) if self.family == "sdxl" else None


class Together:
    """A world of threads. act: is done whenever all have met."""

    def __init__(self, size: int, act=lambda: None):
        self.size, self.texts, self.barrier = size, [""] * size, threading.Barrier(size, timeout=20, action=act)

    def run(self, work) -> None:
        """work(world) in every thread, until all have ended."""
        threads = [threading.Thread(target=work, args=(Rank(rank, self.size, self),)) for rank in range(self.size)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)


@dataclass(frozen=True)
class Rank:
    """One of them, as ``diffalign.world.World``."""

    rank: int
    size: int
    together: Together

    def gather(self, text: str) -> list[str]:
        self.together.texts[self.rank] = text
        self.together.barrier.wait()
        texts = list(self.together.texts)
        self.together.barrier.wait()
        return texts


def pairs(folder: Path, count: int = 6, *, sizes=((16, 16),), prompts: int = 3, name: str = "pairs.jsonl") -> Path:
    """A JSONL of chosen and rejected pictures beside a folder of them."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        for side, offset in (("chosen", 0), ("rejected", 1000)):
            (folder / "pictures" / f"{side}{i}.png").write_bytes(picture(i + offset, sizes[i % len(sizes)]))
        rows.append({"prompt": f"prompt {i % prompts}", "chosen": f"pictures/chosen{i}.png",
                     "rejected": f"pictures/rejected{i}.png"})
    return jsonl(folder / name, rows)


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec(path, **options) -> DataSpec:
    return DataSpec(path=str(path), encode_batch_size=options.pop("encode_batch_size", 4), **options)
