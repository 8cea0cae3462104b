"""Anything that scores pictures or clips. Built-in rewards are a literal table; a third party's come by the entry points
"diffalign.rewards" of its package, or from a file that the command line names with --rewards-from.
"""

from .aesthetic import Aesthetic
from .audiobox import Audiobox
from .base import Reward, check, columns_of, identity, judged, subject_of
from .blend import Calibrated, LogSigmoidCentred, Minimum, WeightedSum, ZScore
from .clap import Clap
from .clip import ClipScore, HPSv2, PickScore
from .clips import Clips
from .hpsv3 import HPSv3
from .image_reward import ImageReward
from .latent import Latent
from .learned import Learned, Pal, StepAware
from .mps import MPS
from .ocr import TextRendering
from .remote import RemoteReward, VLMJudge
from .rules import Brightness, Colourfulness, Compressibility
from .scenes import SceneChecker
from .signal import Signal

REWARDS = {
    "scenes": SceneChecker,
    "brightness": Brightness,
    "colourfulness": Colourfulness,
    "compressibility": Compressibility,
    "weighted_sum": WeightedSum,
    "z_score": ZScore,
    "minimum": Minimum,
    "log_sigmoid_centred": LogSigmoidCentred,
    "calibrated": Calibrated,
    "learned": Learned,
    "pal": Pal,
    "step_aware": StepAware,
    "clip": ClipScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "aesthetic": Aesthetic,
    "mps": MPS,
    "hpsv3": HPSv3,
    "image_reward": ImageReward,
    "ocr": TextRendering,
    "remote": RemoteReward,
    "vlm": VLMJudge,
    "latent": Latent,
    "clips": Clips,
    "clap": Clap,
    "audiobox": Audiobox,
    "signal": Signal,
}

__all__ = ["REWARDS", "Reward", "check", "columns_of", "identity", "judged", "subject_of"]
