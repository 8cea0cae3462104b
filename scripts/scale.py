"""Memory and start-up time against the number of pairs: python scripts/scale.py [--rows 1000 10000 100000] [--json FILE]

Pairs of distinct 8x8 pictures in a parquet file, a prompt for every four pairs, encoders of no cost: what is measured is what
grows with the rows. Each stage runs in a process of its own: "encode" builds the cache; "open" is what training does before
its first step: open the cache, order the rows, make the first batch, and one of held-out pairs. What is reported is the
growth over the start of a stage, in MiB: of the peak of the memory that is the process's own (anonymous: neither mapped files
nor page cache, which the system takes back when it needs to), and of the peak of mapped files' pages that it has looked at.
Seconds are the processor's, so that others on the machine matter less.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffalign import data

PROMPT_EVERY, BATCH = 4, 64
ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", **os.environ}  # as the command line has it


class Encoders:
    """Latents [N, 4, 2, 2] and embeddings that cost nothing."""

    family, spatial_factor, identity = "sd", 4, {"vae": "scale", "text": "scale"}

    def encode_images(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels.float(), 4)
        return torch.cat([mean, mean[:, :1]], 1), torch.full((len(pixels), 4, 2, 2), 0.1)

    def encode_prompts(self, prompts):
        return torch.tensor([[[float(len(text))] * 4] for text in prompts]), None

    def unconditional(self):
        return torch.zeros(1, 1, 4), None


def write(path: Path, rows: int) -> None:
    schema = pa.schema({"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1000):
            numbers = range(start, min(start + 1000, rows))
            writer.write_table(pa.table({
                "jpg_0": [picture(2 * i) for i in numbers], "jpg_1": [picture(2 * i + 1) for i in numbers],
                "label_0": [1.0] * len(numbers), "caption": [f"prompt {i // PROMPT_EVERY}" for i in numbers]}, schema))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG", compress_level=0)
    return target.getvalue()


def spec(folder: Path):
    return data.DataSpec(path=str(folder / "pairs.parquet"), encode_batch_size=BATCH)


def build(folder: Path):
    encoders = Encoders()
    return data.encode(spec(folder), lambda: encoders, cache_dir=folder / "cache", resolution=8, seed=0, facts=encoders,
                       progress=False)


def stage(name: str, folder: Path) -> dict[str, float]:
    """Run in a process of its own, with everything imported before the first look."""
    import datasets  # noqa: F401

    import diffalign.data.encoding  # noqa: F401
    import diffalign.data.offline  # noqa: F401

    with Watch() as watch:
        found = build(folder)  # for "open" it finds what is there
        if name == "open":
            source = data.Offline(data.Cache(found.manifest), seed=0, train_batch_size=BATCH, prefetch=False)
            assert len(source.take(0)) == 1
            held_out = data.fixed_batches(source.cache, BATCH)
            assert held_out[len(held_out) - 1].groups > 0
    return watch.found


class Watch:
    """Looks at the process's own memory every few milliseconds. found: MiB above the start, and the processor's seconds."""

    def __enter__(self):
        self.process, self.done, self.started = psutil.Process(), threading.Event(), time.process_time()
        self.before = self.peak = self.now()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self) -> np.ndarray:
        """Bytes: own, of mapped files."""
        found = self.process.memory_info()
        return np.array([found.rss - found.shared, found.shared])

    def watch(self):
        while not self.done.wait(0.005):
            self.peak = np.maximum(self.peak, self.now())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        own, mapped = (np.maximum(self.peak, self.now()) - self.before) / 2**20
        self.found = {"seconds": time.process_time() - self.started, "own": own, "mapped": mapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(stage(args.stage[0], Path(args.stage[1]))))
        return
    results = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "pairs.parquet", rows)
            for name in ("encode", "open"):
                command = [sys.executable, __file__, "--stage", name, folder]
                said = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
                found = json.loads(said.splitlines()[-1])
                results.append({"rows": rows, "stage": name, **found})
                print(f"{rows:>9,} pairs  {name:6}  {found['seconds']:8.2f} s  MiB: own {found['own']:7.1f}  "
                      f"mapped {found['mapped']:7.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
