"""Objectives, links and pair rules. Imports torch and the types, nothing else of the package."""

from .base import Objective
from .links import Hinge, Link, Logistic, Robust, Squared
from .mapo import MaPO, MaPOAAAI
from .pairs import AllPairs, BestWorst, Pairs
from .pairwise import Pairwise
from .sft import SFT, Anchored

OBJECTIVES = {"dpo": Pairwise, "mapo": MaPO, "mapo_aaai": MaPOAAAI, "sft": SFT, "anchored": Anchored}
LINKS = {"logistic": Logistic, "ipo": Squared, "hinge": Hinge, "robust": Robust}
PAIRS = {"best_worst": BestWorst, "all": AllPairs}

__all__ = ["LINKS", "OBJECTIVES", "PAIRS", "SFT", "AllPairs", "Anchored", "BestWorst", "Hinge", "Link", "Logistic", "MaPO",
           "MaPOAAAI", "Objective", "Pairs", "Pairwise", "Robust", "Squared"]
