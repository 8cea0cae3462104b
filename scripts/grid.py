"""Draw the comparison grid: python scripts/grid.py CONFIG [key=value ...], the same as `diffalign grid`."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["grid", *sys.argv[1:]]))
