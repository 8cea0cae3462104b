"""Encode latents and text embeddings: python scripts/encode.py CONFIG [key=value ...], the same as `diffalign encode`."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["encode", *sys.argv[1:]]))
