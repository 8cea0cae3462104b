"""The embedded latent reward model: configs/tiny/lrm.yaml on more pairs, stored in half precision.

    OMP_NUM_THREADS=1 python scripts/assets/make_lrm.py --work outputs/tiny-lrm --out assets/tiny-lrm

480 pairs are too few for it, so rendered near misses join them: a scene against the same scene with one attribute changed,
both roughened as a sample would be; none of either is held out. No further sample of a model and no score of the checker is
read.

Call it from the repository root. Goes on where it stopped; a function of the recipe's seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from diffalign import _compat  # noqa: F401  (before transformers: it mends a torchvision that does not fit torch)

# isort: split
from make_clip import roughen
from make_preferences import SCHEMA, to_jpeg

from diffalign.config import load_recipe
from diffalign.models.latent_reward import load_scorer
from diffalign.models.spec import LATENT_REWARD
from diffalign.rewards.base import as_pil
from diffalign.rewards.scenes import KINDS, Scene, alter, caption, is_held_out, random_scene, render
from diffalign.run import train


def near_misses(rng: np.random.Generator, count: int) -> Iterator[dict]:
    """Rows like those of train.parquet, the kinds in turn; scores 1 and 0 stand for right and wrong."""
    for number in range(count):
        scene, other = _two_scenes(rng, KINDS[number % len(KINDS)])
        pixels = np.stack([render(scene, rng), render(other, rng)])
        right, wrong = (to_jpeg(as_pil(x)) for x in roughen(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, rng))
        sides, label = ((right, wrong), 1.0) if rng.random() < 0.5 else ((wrong, right), 0.0)
        yield dict(zip(SCHEMA.names, [*sides, label, caption(scene), label, 1 - label], strict=True))


def _two_scenes(rng: np.random.Generator, kind: str) -> tuple[Scene, Scene]:
    while True:
        scene = random_scene(rng, kind)
        other = alter(scene, rng)
        if not is_held_out(scene) and not is_held_out(other):
            return scene, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/tiny/lrm.yaml")
    parser.add_argument("--rendered", type=int, default=32000, help="pairs of rendered scenes")
    parser.add_argument("--repeats", type=int, default=8, help="how often each preference pair stands beside them")
    parser.add_argument("--steps", type=int, nargs="+", default=[5000, 7500],
                        help="ends of the stages; the learning rate falls to 0 at each, and the next takes up its own cosine")
    parser.add_argument("--work", default="outputs/tiny-lrm", help="folder for the run")
    parser.add_argument("--out", default="assets/tiny-lrm")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(args.recipe)
    rendered = pa.Table.from_pylist(list(near_misses(np.random.default_rng(recipe.seed), args.rendered)), schema=SCHEMA)
    drawn = args.repeats * [pq.read_table(recipe.data.path, schema=SCHEMA)]
    pq.write_table(pa.concat_tables([*drawn, rendered]), work / "pairs.parquet")
    for steps in args.steps:
        facts = train(load_recipe(args.recipe, [f"output_dir={work}/run", f"data.path={work}/pairs.parquet",
                                                f"train.max_train_steps={steps}",
                                                "train.allow_change=[train.max_train_steps]"]), printer=print)
    load_scorer(work / "run" / LATENT_REWARD).module.save_pretrained(args.out, dtype=torch.float16)
    print(json.dumps(facts["heldout"], indent=1))


if __name__ == "__main__":
    main()
