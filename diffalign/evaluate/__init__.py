"""Honest evaluation: paired comparison, held-out preference accuracy, report and model card.

Names load on first use, so that reading a recipe does not import torch for this package's sake. The comparison itself is
``diffalign.evaluate.compare.compare``: a name that is also a module's cannot be loaded late.
"""

from importlib import import_module as _import

_PUBLIC = {
    "EvaluateSpec": "spec",
    "read_prompts": "prompts", "Prompts": "prompts",
    "lora_off_and_on": "compare", "picture_seeds": "compare", "Comparison": "compare",
    "paired": "statistics", "Paired": "statistics", "wilson": "statistics",
    "Vote": "ratings", "compare_votes": "ratings", "compare_scores": "ratings", "bradley_terry": "ratings",
    "win_fractions": "ratings", "KSort": "ratings", "matchmake": "ratings",
    "heldout_preference": "preference", "HeldoutPreference": "preference", "before_and_after": "preference",
    "Run": "report", "write_report": "report", "write_grid": "report",
    "write_card": "card",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diffalign.evaluate' has no attribute '{name}'")
    return getattr(_import(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
