"""Filters drop groups from preference data, and say what they dropped and why. A literal table; none rewrites a picture."""

from .curate import Curate
from .duplicates import Duplicates
from .fifa import Fifa
from .margin import Margin, Ties
from .text import EMBEDDERS, QUALITIES, Embedder, Quality

FILTERS = {
    "ties": Ties,
    "duplicates": Duplicates,
    "margin": Margin,
    "fifa": Fifa,
    "curate": Curate,
}

__all__ = ["EMBEDDERS", "FILTERS", "QUALITIES", "Curate", "Duplicates", "Embedder", "Fifa", "Margin", "Quality", "Ties"]
