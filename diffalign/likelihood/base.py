"""What the estimators have in common."""

from __future__ import annotations

from collections.abc import Mapping


def shares(against: Mapping[str, float] | str | None) -> dict[str, float]:
    """Weight sets that stand for the reference, with shares that sum to 1; of a single name all, of None nothing."""
    return {against: 1.0} if isinstance(against, str) else dict(against or {})
