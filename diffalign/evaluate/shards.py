"""Work over prompts shared among processes: who does what, and everybody hears of everything."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping

import numpy as np

from ..errors import DataError, first_line
from ..world import World, together


def blocks(count: int, step: int, world: World) -> list[slice]:
    """This rank's slices of range(count). Where blocks begin depends on ``step`` alone, so a picture is drawn in the same
    batch whatever the number of processes: it is the same to the last bit.
    """
    return [slice(start, min(start + step, count)) for start in range(world.rank * step, count, world.size * step)]


def exchange(world: World, work: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that ``work`` makes on all ranks, by name; each name is of one rank. Travels as npz: nothing is unpickled.
    A UserError of one rank is raised on all.
    """
    if world.size == 1:
        return dict(work())
    texts = together(world, lambda: base64.b64encode(packed(work())).decode())
    return {name: array for text in texts for name, array in unpacked(base64.b64decode(text)).items()}


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    target = io.BytesIO()
    np.savez_compressed(target, **arrays)
    return target.getvalue()


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """What ``packed`` was given. Raises DataError for anything else."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile, zlib and numpy's readers raise whatever a damaged file leads to
        raise DataError(f"no whole file of arrays ({first_line(error)})") from None
