"""``diffalign train-reward``: a reward learned from preferences."""

from __future__ import annotations

from pathlib import Path

from ..reward_training import RewardRecipe
from ..reward_training import train_reward as learn
from ..train.checkpoint import check_writable, claimed
from .words import Printer, silent


def train_reward(recipe: RewardRecipe, printer: Printer = silent) -> dict:
    """Train, measure on held-out pairs, save ``output_dir``/reward. Returns reward.json. Raises UserError children."""
    output_dir = Path(recipe.output_dir)
    check_writable(output_dir)
    with claimed(output_dir):  # of two at once one would save its weights under the other's report
        return learn(recipe, printer)
