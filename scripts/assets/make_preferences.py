"""Make the preference set of the tiny SDXL: its own samples, judged by the exact scene checker.

    OMP_NUM_THREADS=1 python scripts/assets/make_preferences.py --model assets/tiny-sdxl --out assets/preferences

About 5 minutes on one CPU core. Each prompt gets some samples; the best is paired with the worst. The training
prompts and the held-out prompts share no (colour, shape, background) combination (`scenes.is_held_out`).
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from diffalign import _compat  # noqa: F401  (before diffusers: it mends a torchvision that does not fit torch)

# isort: split
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffalign.rewards.scenes import KINDS, SceneChecker, caption, every_scene, is_held_out

SCHEMA = pa.schema(
    {
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float32(),
        "caption": pa.string(),
        "score_0": pa.float32(),
        "score_1": pa.float32(),
    }
)
RANKED = pa.schema({"prompt": pa.string(), "images": pa.list_(pa.binary()), "scores": pa.list_(pa.float32())})


def prompts(seed: int, *, held_out: bool) -> Iterator[str]:
    """Captions of one side of the split without repetition, the kinds in turn, until each kind is used up."""
    queues = []
    for kind in KINDS:
        captions = [caption(scene) for scene in every_scene(kind) if is_held_out(scene) == held_out]
        random.Random(f"{seed}/{kind}/{held_out}").shuffle(captions)
        queues.append(captions)
    while any(queues):
        yield from (queue.pop() for queue in queues if queue)


def draw(pipe: StableDiffusionXLPipeline, texts: list[str], options: argparse.Namespace) -> list[list[bytes]]:
    """JPEG samples of each text. The noise of a sample is keyed by (seed, text, index), whatever the batch."""
    keys = [f"{options.seed}/{text}/{i}" for text in texts for i in range(options.samples)]
    generators = [torch.Generator().manual_seed(random.Random(key).getrandbits(63)) for key in keys]
    images = pipe(
        [text for text in texts for _ in range(options.samples)],
        generator=generators,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
    ).images
    coded = [to_jpeg(image) for image in images]
    return [coded[i : i + options.samples] for i in range(0, len(coded), options.samples)]


def to_jpeg(image: Image.Image) -> bytes:
    """High quality and full colour resolution: what the checker scores is what the file holds."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, subsampling=0, optimize=True)
    return buffer.getvalue()


def score(text: str, samples: list[bytes]) -> list[float]:
    return SceneChecker()([Image.open(io.BytesIO(data)) for data in samples], [text] * len(samples)).tolist()


def pair_up(text: str, samples: list[bytes], scores: list[float], seed: int) -> dict:
    """Best against worst on a random side; two samples of equal score are a tie, labelled 0.5."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        best, worst = 0, 1
    sides = [best, worst] if random.Random(f"{seed}/side/{text}").random() < 0.5 else [worst, best]
    first, second = (scores[i] for i in sides)
    label = 0.5 if first == second else float(first > second)
    return dict(zip(SCHEMA.names, [samples[sides[0]], samples[sides[1]], label, text, first, second], strict=True))


def collect(pipe: StableDiffusionXLPipeline, texts: Iterator[str], wanted: int, options: argparse.Namespace) -> tuple:
    """`wanted` pairs in the order of the prompts, and the scored groups they came from. The first ties are kept up to their
    share, later ones dropped; groups without a better and a worse picture are no ranking.
    """
    rows, groups, ties = [], [], 0
    while len(rows) < wanted:
        chunk = list(islice(texts, 16))
        if not chunk:
            raise SystemExit(f"the prompts ran out at {len(rows)} of {wanted} pairs: ask for fewer or raise --samples")
        for text, samples in zip(chunk, draw(pipe, chunk, options), strict=True):
            scores = score(text, samples)
            row = pair_up(text, samples, scores, options.seed)
            tied = row["label_0"] == 0.5
            if not tied or ties < options.tie_share * wanted:
                rows.append(row)
                ties += tied
            if not tied:
                groups.append({"prompt": text, "images": samples, "scores": scores})
        print(f"{len(rows)}/{wanted} pairs, {ties} ties", flush=True)
    return rows[:wanted], groups


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-sdxl"))
    parser.add_argument("--out", type=Path, default=Path("assets/preferences"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--validation-pairs", type=int, default=96)
    parser.add_argument("--heldout-prompts", type=int, default=192)
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--tie-share", type=float, default=0.05)
    # without guidance the base makes more mistakes, which is what pairs are made of
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--ranked", type=int, default=200, help="training prompts whose samples are all kept, with scores")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    heldout = islice(prompts(options.seed, held_out=True), options.heldout_prompts)
    (options.out / "heldout_prompts.txt").write_text("\n".join(heldout) + "\n")
    pipe = StableDiffusionXLPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    for name, wanted in {"train": options.pairs, "validation": options.validation_pairs}.items():
        rows, groups = collect(pipe, prompts(options.seed, held_out=name == "validation"), wanted, options)
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), options.out / f"{name}.parquet")
        if name == "train":
            pq.write_table(pa.Table.from_pylist(groups[: options.ranked], schema=RANKED), options.out / "ranked.parquet")


if __name__ == "__main__":
    main()
