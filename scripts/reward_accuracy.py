"""How often rewards order labelled pairs as labelled, with an interval over prompts, and whether one beats another.

    OMP_NUM_THREADS=1 python scripts/reward_accuracy.py REWARDS PAIRS

REWARDS: as `diffalign score` takes them: kinds, a YAML mapping of names to rewards, or a file that holds one. PAIRS: a file of
labelled pairs or ranked groups. Ties are left out. A difference is to the first reward, paired, bootstrapped over prompts.
"""

from __future__ import annotations

import argparse
import sys

from diffalign.cli import _quiet_libraries
from diffalign.config import load_score
from diffalign.data.columns import Tally
from diffalign.data.spec import DataSpec
from diffalign.errors import UserError
from diffalign.evaluate.statistics import bootstrap
from diffalign.reward_training.accuracy import RESAMPLES, accuracy, prompt_shares
from diffalign.reward_training.pairs import read_pairs
from diffalign.reward_training.training import margins_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards")
    parser.add_argument("pairs")
    args = parser.parse_args()
    spec = DataSpec(path=args.pairs)
    pairs = read_pairs(spec, Tally(), part="train", seed=0)
    first = None
    for name, reward in load_score(args.rewards, args.pairs).rewards.items():
        margins = margins_of(reward, pairs, spec)
        found = accuracy(margins, pairs.target, pairs.prompt)
        line = f"{name}: {_percent(found.value, found.low, found.high)} of {found.pairs} pairs, {found.prompts} prompts"
        shares = prompt_shares(margins, pairs.target, pairs.prompt)
        if first is None:
            first = shares
        else:
            gain = shares - first
            line += f"; {_percent(gain.mean(), *bootstrap(gain[None], seed=0, resamples=RESAMPLES)[0])} more than the first"
        print(line, flush=True)


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    _quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
