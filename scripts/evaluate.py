"""Compare base and aligned model: python scripts/evaluate.py CONFIG [key=value ...], the same as `diffalign evaluate`."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
