"""Objectives, links, pair rules and labels. Imports torch and the types, nothing else of the package."""

from .base import Objective, needs_scores, reads_weighting, title_of
from .kto import KTO
from .labels import DCG, GapWeight, Hard, Label, Labels, Offset, SoftMargin, SoftTarget
from .links import (
    BCO,
    EXO,
    NCA,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    FDivergence,
    Hinge,
    Link,
    Logistic,
    Robust,
    Squared,
)
from .listwise import PlackettLuce, SetContrast
from .mapo import MaPO, MaPOAAAI
from .orpo import ORPO
from .pairs import AllPairs, BestWorst, EasyToHard, Pairs
from .pairwise import Pairwise
from .regularized import Regularized
from .sft import SFT

OBJECTIVES = {"dpo": Pairwise, "mapo": MaPO, "mapo_aaai": MaPOAAAI, "sft": SFT, "kto": KTO, "orpo": ORPO,
              "plackett_luce": PlackettLuce, "set_contrast": SetContrast, "regularized": Regularized}
LINKS = {"logistic": Logistic, "ipo": Squared, "hinge": Hinge, "robust": Robust, "exo": EXO, "discopop": DiscoPOP,
         "f_divergence": FDivergence, "nca": NCA, "bco": BCO, "sppo": SPPO, "apo_zero": APOZero, "apo_down": APODown}
PAIRS = {"best_worst": BestWorst, "all": AllPairs, "easy_to_hard": EasyToHard}
LABELS = {"hard": Hard, "soft_target": SoftTarget, "soft_margin": SoftMargin, "offset": Offset, "dcg": DCG,
          "gap_weight": GapWeight}

__all__ = ["BCO", "DCG", "EXO", "KTO", "LABELS", "LINKS", "NCA", "OBJECTIVES", "ORPO", "PAIRS", "SFT", "SPPO", "APODown",
           "APOZero", "AllPairs", "BestWorst", "DiscoPOP", "EasyToHard", "FDivergence", "GapWeight", "Hard", "Hinge", "Label",
           "Labels",
           "Link", "Logistic", "MaPO", "MaPOAAAI", "Objective", "Offset", "Pairs", "Pairwise", "PlackettLuce", "Robust",
           "Regularized", "SetContrast", "SoftMargin", "SoftTarget", "Squared",
           "needs_scores", "reads_weighting", "title_of"]
