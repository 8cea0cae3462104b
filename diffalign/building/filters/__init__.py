"""Filters drop groups from preference data, and say what they dropped and why. A literal table; none rewrites a picture."""

from .consistent import Consistent
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
    "consistent": Consistent,
}

__all__ = ["EMBEDDERS", "FILTERS", "QUALITIES", "Consistent", "Curate", "Duplicates", "Embedder", "Fifa", "Margin", "Quality",
           "Ties"]
