"""The reference's errors, measured beforehand. Where the reference is frozen and all noise is keyed, its error is one number
per (candidate, visit, draw), the same in every run over the same data, whatever beta, link or learning rate.

    cache_dir/reference-<id>/<start>-<stop>-<hash>-<size>.arrow     row, visit, error: of the groups at these places of a run

The id is a hash of all that a number depends on. A file is whole or absent (``store.publish``), so a build may be killed.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left, bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..errors import DataError, ResourceError
from .store import OPEN_SHARDS, intact, publish, read_table, sweep


class ReferenceErrors:
    """What lies in one folder, memory-mapped. damaged: files that were, now renamed to ``.corrupt``; their places are missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._starts: list[int] = []  # of the places that a part is read for: parts may overlap
        self._parts: list[tuple[int, int, Path]] = []
        self.damaged = 0
        found = []
        for path in folder.glob("*.arrow"):
            if intact(path):
                found.append((*map(int, path.name.split("-")[:2]), path))
            else:
                self.damaged += 1
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_suffix(".corrupt"))
        end = 0
        for start, stop, path in sorted(found, key=lambda part: (part[0], -part[1])):
            if stop > end:
                self._starts.append(max(start, end))
                self._parts.append((start, stop, path))
                end = stop
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def holds(self, start: int, stop: int) -> int:
        """How many of the places start .. stop - 1 are there."""
        count = 0
        for i in range(max(0, bisect_right(self._starts, start) - 1), bisect_left(self._starts, stop)):
            count += max(0, min(stop, self._parts[i][1]) - max(start, self._starts[i]))
        return count

    def read(self, places: np.ndarray, keys: Tensor) -> Tensor:
        """places: [B] int64, of groups that are there, with their keys [B, 2] -> [B, K, draws] float32.

        Raises DataError where a place belongs to another (row, visit): the numbers of one pair must not go to another.
        """
        rows = []
        for place, key in zip(places.tolist(), keys.tolist(), strict=True):
            start, _, path = self._parts[bisect_right(self._starts, place) - 1]
            owners, errors = self._open(path)
            if owners[place - start].tolist() != key:
                raise DataError(f"{path}: holds the reference's errors of other rows than this run reads; remove "
                                f"{self.folder} and run `diffalign encode CONFIG --reference` again")
            rows.append(errors[place - start])
        return torch.from_numpy(np.stack(rows))

    def _open(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        table = read_table(path)
        errors = table["error"].combine_chunks().values.to_numpy()
        shape = [int(side) for side in table.schema.metadata[b"shape"].split(b",")]
        return np.stack([table["row"].to_numpy(), table["visit"].to_numpy()], axis=1), errors.reshape(len(table), *shape)


def prepare(folder: Path) -> None:
    """Make the folder; drop what killed processes left behind. Raises ResourceError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot make the cache folder ({error.strerror}); set data.cache_dir") from None
    sweep(folder)


def write(folder: Path, start: int, keys: Tensor, errors: Tensor) -> Path:
    """Publish the errors [N, K, draws] float32 of N groups with keys [N, 2], at the places from ``start`` on.

    Raises DataError for one that is not finite, ResourceError when the disk is full.
    """
    bad = (~errors.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        row, visit = keys[bad[0]].tolist()
        raise DataError(f"row {row} visit {visit}: the reference's error is not finite; look at this row, or use "
                        "train.mixed_precision=bf16 or no")
    count, *shape = errors.shape
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(errors.float().cpu().numpy().reshape(-1)), errors[0].numel())
    table = pa.table({"row": keys[:, 0].numpy(), "visit": keys[:, 1].numpy(), "error": numbers})
    table = table.replace_schema_metadata({"shape": ",".join(map(str, shape))})
    return publish(table, folder, f"{start:012d}-{start + count:012d}-")
