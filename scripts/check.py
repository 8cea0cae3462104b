"""Look at data and options before training: python scripts/check.py CONFIG [key=value ...], the same as `diffalign check`."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["check", *sys.argv[1:]]))
