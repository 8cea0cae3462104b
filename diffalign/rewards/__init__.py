"""Anything that scores pictures. Built-in rewards are a literal table; a third party's come by the entry points
"diffalign.rewards" of its package, or from a file that the command line names with --rewards-from.
"""

from .aesthetic import Aesthetic
from .base import Reward, check, columns_of, identity, judged
from .clip import ClipScore, HPSv2, PickScore
from .mps import MPS
from .rules import Brightness, Colourfulness, Compressibility
from .scenes import SceneChecker

REWARDS = {
    "scenes": SceneChecker,
    "brightness": Brightness,
    "colourfulness": Colourfulness,
    "compressibility": Compressibility,
    "clip": ClipScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "aesthetic": Aesthetic,
    "mps": MPS,
}

__all__ = ["REWARDS", "Reward", "check", "columns_of", "identity", "judged"]
