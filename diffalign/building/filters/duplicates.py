"""Drops what is there twice: pictures within a group, groups, and too many groups of one prompt."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ... import rng
from ...data.columns import normalised
from ..pictures import fetch
from ..types import Candidate, Group, Kept
from .margin import ends

SIDE, LOW, LEVELS = 32, (8, 4, 4), 16  # thumbnail, frequencies of each axis for luma and chroma, steps of a mean
SILENT = 8.0  # a coefficient below this, of a thumbnail in 0..255, is noise of a JPEG rather than a pattern


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Drops, in this order: candidates that show the same picture as an earlier one of their group, and groups left with one;
    groups that repeat another's prompt and pair of pictures, or contradict it; groups beyond a prompt's share.

    same: what makes two pictures the same: equal bytes, equal pixels, or a perceptual hash (see ``perceptual_hash``) that
    differs in at most ``distance`` of its 138 bits. contradictions: of groups with the same prompt and the same best and
    worst picture in opposite order, keep one of the more frequent order (none when even), or "drop" all of them.
    max_groups_per_prompt: which ones stay is drawn by the seed and the groups' ids, not by their order. Prompts are compared
    without case, spacing or final full stop.
    """

    same: Literal["bytes", "pixels", "perceptual"] = "pixels"
    distance: int = 4
    contradictions: Literal["majority", "drop"] = "majority"
    max_groups_per_prompt: int | None = None

    def __post_init__(self):
        if not 0 <= self.distance < 138:
            raise ValueError(f"distance must lie in 0..137 bits, got {self.distance}")
        if self.max_groups_per_prompt is not None and self.max_groups_per_prompt < 1:
            raise ValueError(f"max_groups_per_prompt must be at least 1, got {self.max_groups_per_prompt}")

    def __call__(self, groups: Sequence[Group], *, folder: Path, seed: int) -> Kept:
        prints, dropped = _Prints(folder, self.same), Counter(identical_pictures=0, repeated=0, contradiction=0, prompt_cap=0)
        single = [self._apart(group, prints) for group in groups]
        fewer = sum(len(after.candidates) < len(before.candidates) for before, after in zip(groups, single))
        left = [after for before, after in zip(groups, single)
                if len(after.candidates) > 1 or len(after.candidates) == len(before.candidates)]
        dropped["identical_pictures"] = len(groups) - len(left)
        left = self._agreed(left, prints, dropped)
        left = self._capped(left, seed, dropped)
        return Kept(groups=left, report={"groups": len(groups), "kept": len(left), "dropped": dict(dropped),
                                         "groups_with_fewer_candidates": fewer - dropped["identical_pictures"]})

    def _apart(self, group: Group, prints: _Prints) -> Group:
        """The group without candidates that look like an earlier one; a group of one is left alone."""
        kept: list[int] = []
        for place, candidate in enumerate(group.candidates):
            if not any(self._alike(prints(candidate), prints(group.candidates[other])) for other in kept):
                kept.append(place)
        return replace(group, candidates=tuple(group.candidates[i] for i in kept),
                       utility=tuple(group.utility[i] for i in kept))

    def _alike(self, one: Any, other: Any) -> bool:
        return (one != other).sum() <= self.distance if self.same == "perceptual" else one == other

    def _agreed(self, groups: list[Group], prints: _Prints, dropped: Counter) -> list[Group]:
        """No group that repeats or contradicts another. Perceptual hashes are compared exactly here."""
        cases: dict[tuple, list[tuple[Group, bool]]] = defaultdict(list)
        kept = set()
        for group in groups:
            pair = ends(group)
            if pair is None or group.utility[pair[0]] == group.utility[pair[1]]:
                kept.add(id(group))  # nothing that could repeat or contradict
                continue
            best, worst = (_key(prints(group.candidates[place])) for place in pair)
            cases[(normalised(group.prompt), *sorted((best, worst)))].append((group, best < worst))
        for found in cases.values():
            forward = [group for group, order in found if order]
            backward = [group for group, order in found if not order]
            winners = max(forward, backward, key=len)
            if forward and backward:
                even = len(forward) == len(backward) or self.contradictions == "drop"
                dropped["contradiction"] += len(found) if even else len(found) - len(winners)
                winners = [] if even else winners
            distinct = {}  # two groups that share their ends alone do not repeat each other
            for group in sorted(winners, key=lambda group: group.id):
                distinct.setdefault(tuple(sorted(_key(prints(candidate)) for candidate in group.candidates)), group)
            dropped["repeated"] += len(winners) - len(distinct)
            kept.update(map(id, distinct.values()))
        return [group for group in groups if id(group) in kept]

    def _capped(self, groups: list[Group], seed: int, dropped: Counter) -> list[Group]:
        if self.max_groups_per_prompt is None:
            return groups
        by_prompt = defaultdict(list)
        for group in groups:
            by_prompt[normalised(group.prompt)].append(group)
        kept = {id(group) for found in by_prompt.values()
                for group in sorted(found, key=lambda group: (rng.integer(seed, f"duplicates|{group.id}"), group.id))
                [:self.max_groups_per_prompt]}
        dropped["prompt_cap"] = len(groups) - len(kept)
        return [group for group in groups if id(group) in kept]


class _Prints:
    """What each picture is compared by, made once a file."""

    def __init__(self, folder: Path, same: str):
        self.folder, self.same, self.known = folder, same, {}

    def __call__(self, candidate: Candidate) -> Any:
        """Raises DataError for a picture that is gone or damaged."""
        if self.same == "bytes":
            return candidate.image  # named by the SHA-256 of its bytes
        if candidate.image not in self.known:
            image = fetch(self.folder, candidate.image)
            self.known[candidate.image] = perceptual_hash(image) if self.same == "perceptual" else _pixels(image)
        return self.known[candidate.image]


def _pixels(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _key(print_: str | np.ndarray) -> str:
    return print_ if isinstance(print_, str) else np.packbits(print_).tobytes().hex()


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """An RGB picture -> [138] bool: which of the lowest DCT terms (the mean apart) of a 32 x 32 thumbnail are above 0, after
    the idea of pHash (Zauner 2010), 63 of luma and 15 of each chroma, and the mean of each in 15 thresholds.

    With colour, unlike the usual hash of the grey picture, for which a red ring and a green ring are one.
    """
    from scipy.fft import dctn

    thumbnail = np.asarray(image.convert("YCbCr").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    bits: list[Iterable[bool]] = []
    for channel, low in zip(thumbnail.transpose(2, 0, 1), LOW):
        bits += [dctn(channel, norm="ortho")[:low, :low].ravel()[1:] > SILENT,
                 channel.mean() > np.arange(1, LEVELS) * (256 / LEVELS)]
    return np.concatenate(bits)


__all__ = ["Duplicates", "perceptual_hash"]
