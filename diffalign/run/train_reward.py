"""``diffalign train-reward``: a reward learned from preferences."""

from __future__ import annotations

from pathlib import Path

from ..reward_training import RewardRecipe
from ..reward_training import train_reward as learn
from ..train.checkpoint import check_writable
from .words import Printer, silent


def train_reward(recipe: RewardRecipe, printer: Printer = silent) -> dict:
    """Train, measure on held-out pairs, save ``output_dir``/reward. Returns reward.json. Raises UserError children."""
    check_writable(Path(recipe.output_dir))
    return learn(recipe, printer)
