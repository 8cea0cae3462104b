"""Label noise for studies: a copy of a table of pairs in which a given share of the labels is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import rng
from ..errors import DataError
from .store import write_aside


def flip_labels(source: Path, target: Path, share: float, *, seed: int = 0) -> int:
    """Copy a Pick-a-Pic parquet with ``share`` of its decided pairs flipped, exactly; ties stay, and rows that training leaves
    out for want of a label (null, or has_label false). Returns the number flipped.

    label_0 becomes 1 - label_0 (label_1 too); score_0 and score_1 change places. The rows are the first of one keyed order,
    so a smaller share's flips are among a larger one's. Pictures stay the same bytes: a cache of latents serves all copies.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    table = pq.read_table(source)
    if "label_0" not in table.column_names:
        raise DataError(f"{source}: has no column label_0, so no label can be flipped; give pairs in Pick-a-Pic's layout")
    label = np.asarray(table["label_0"].to_pylist(), np.float64)
    decided = np.isfinite(label) & (label != 0.5)
    if "has_label" in table.column_names:
        decided &= [told is not False for told in table["has_label"].to_pylist()]
    order = rng.permutation(len(label), seed, "label_flips")
    order = order[decided[order]]
    flipped = np.zeros(len(label), bool)
    flipped[order[:round(share * len(order))]] = True
    columns = {name: np.asarray(table[name].to_pylist(), np.float64)
               for name in ("label_0", "label_1", "score_0", "score_1") if name in table.column_names}
    changed = {name: np.where(flipped, 1 - columns[name], columns[name]) for name in columns if name.startswith("label")}
    if "score_0" in columns and "score_1" in columns:
        changed |= {"score_0": np.where(flipped, columns["score_1"], columns["score_0"]),
                    "score_1": np.where(flipped, columns["score_0"], columns["score_1"])}
    for name, values in changed.items():
        column = pa.array(values, table.schema.field(name).type, from_pandas=True)  # NaN is null again
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    target.parent.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_aside(target, sink.getvalue())
    return int(flipped.sum())
