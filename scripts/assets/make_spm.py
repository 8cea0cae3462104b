"""The embedded step-aware preference model: configs/rewards/tiny_spm.yaml, trained and stored in half precision.

    OMP_NUM_THREADS=1 python scripts/assets/make_spm.py --work outputs/tiny-spm --out assets/tiny-spm

Call it from the repository root. A function of the recipe's seed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffalign.config import load_reward_recipe
from diffalign.reward_training import train_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="configs/rewards/tiny_spm.yaml")
    parser.add_argument("--work", default="outputs/tiny-spm", help="folder for the run")
    parser.add_argument("--out", default="assets/tiny-spm", type=Path)
    args = parser.parse_args()
    train_reward(load_reward_recipe(args.recipe, [f"output_dir={args.work}"]))
    args.out.mkdir(parents=True, exist_ok=True)
    source = Path(args.work) / "reward"
    shutil.copy(source / "config.json", args.out)
    save_file({name: value.half() for name, value in load_file(source / "model.safetensors").items()},
              args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
