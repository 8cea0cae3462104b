"""Whether edited pictures can be told from their originals by traces of the editor instead of what was edited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 32     # pixels of the crop that is looked at
FEWEST = 20   # pairs below which nothing can be said
MOST = 500
FOLDS = 5


def probe(originals: Sequence[Image.Image], edits: Sequence[Image.Image]) -> dict | None:
    """Cross-validated accuracy of a linear probe that sees the finest detail (what a 3 x 3 mean takes away) of the middle of
    each picture: near 0.5 the editor leaves no constant trace; {"accuracy", "low", "high", "pairs"}, a 95 % Wilson interval
    with each pair counted once. None for fewer than 20 pairs, or pictures below 32 pixels.

    Both pictures of a pair are always in the same fold.
    """
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pairs = min(len(originals), MOST)
    sides = [*originals[:pairs], *edits[:pairs]]
    if pairs < FEWEST or any(min(image.size) < SIDE for image in sides):
        return None
    features = np.stack([_detail(image) for image in sides])
    labels = np.repeat([0, 1], pairs)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    told = cross_val_predict(model, features, labels, groups=np.tile(np.arange(pairs), 2), cv=GroupKFold(FOLDS))
    right = float((told == labels).mean())
    interval = binomtest(round(right * pairs), pairs).proportion_ci(method="wilson")
    return {"accuracy": round(right, 4), "low": round(interval.low, 4), "high": round(interval.high, 4), "pairs": pairs}


def _detail(image: Image.Image) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    crop = np.asarray(image.convert("RGB").crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    return (crop - uniform_filter(crop, size=(3, 3, 1))).ravel()
