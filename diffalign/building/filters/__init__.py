"""Filters drop groups from preference data, and say what they dropped and why. A literal table; none rewrites a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ..types import Filter, Group, Kept
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


def filtered(groups: Sequence[Group], filters: Sequence[Filter], *, folder: Path, seed: int) -> Kept:
    """One filter after another. report: {"steps": [one a filter], "groups": before, "kept": after}.

    Raises DataError naming the filter that left nothing.
    """
    left, steps = list(groups), []
    for filter in filters:
        name = next((kind for kind, known in FILTERS.items() if type(filter) is known), type(filter).__name__)
        kept = filter(left, folder=folder, seed=seed)
        steps.append({"filter": name, **kept.report})
        if left and not kept.groups:
            dropped = ", ".join(f"{count} {reason}" for reason, count in kept.report.get("dropped", {}).items() if count)
            raise DataError(f"filter {name}: leaves none of {len(left)} groups ({dropped}); loosen its options, or leave "
                            "it out")
        left = kept.groups
    return Kept(groups=left, report={"groups": len(groups), "kept": len(left), "steps": steps})


__all__ = ["EMBEDDERS", "FILTERS", "QUALITIES", "Curate", "Duplicates", "Embedder", "Fifa", "Margin", "Quality", "Ties",
           "filtered"]
