"""Align a model from a recipe: python scripts/train.py CONFIG [key=value ...], the same as `diffalign train`."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
