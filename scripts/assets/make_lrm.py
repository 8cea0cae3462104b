"""The embedded latent reward model: configs/tiny/lrm.yaml, trained and stored in half precision.

    OMP_NUM_THREADS=1 python scripts/assets/make_lrm.py --work outputs/tiny-lrm --out assets/tiny-lrm

Call it from the repository root. Goes on where it stopped; a function of the recipe's seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from diffalign.config import load_recipe
from diffalign.models.latent_reward import load_scorer
from diffalign.models.spec import LATENT_REWARD
from diffalign.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/tiny/lrm.yaml")
    parser.add_argument("--work", default="outputs/tiny-lrm", help="folder for the run")
    parser.add_argument("--out", default="assets/tiny-lrm")
    args = parser.parse_args()
    facts = train(load_recipe(args.recipe, [f"output_dir={args.work}"]), printer=print)
    load_scorer(Path(args.work) / LATENT_REWARD).module.save_pretrained(args.out, dtype=torch.float16)
    print(json.dumps(facts["heldout"], indent=1))


if __name__ == "__main__":
    main()
