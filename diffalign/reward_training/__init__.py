"""Training rewards on preferences: Bradley-Terry heads, pluralistic heads (PAL) and weights of combined rewards."""

from .calibration import Calibration, fit_calibration
from .spec import RewardLora, RewardRecipe, StepSpec
from .training import check_recipe, train_reward

__all__ = ["Calibration", "RewardLora", "RewardRecipe", "StepSpec", "check_recipe", "fit_calibration", "train_reward"]
