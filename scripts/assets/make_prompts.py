"""Write prompts of the tiny SDXL to build preference data on: captions that are not held out, the kinds in turn.

    python scripts/assets/make_prompts.py --count 512 --out assets/prompts/train.txt
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from make_preferences import prompts

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1, help="0 is what the shipped preference pairs were made with")
    parser.add_argument("--out", type=Path, default=Path("assets/prompts/train.txt"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(f"{text}\n" for text in islice(prompts(options.seed, held_out=False), options.count)))
